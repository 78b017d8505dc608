"""The Chinese page of settings: an introduction by hand, and what is generated in English.

python -m docs.chinese_settings           # writes docs/configuration.zh.md
"""

from pathlib import Path

from lvllm.settings.variables import markdown

__all__ = ["PAGE", "current"]

PAGE = Path(__file__).with_name("configuration.zh.md")
TABLE = "| variable |"
"""How the generated part begins."""


def current() -> str:
    """The text that the page should have."""
    introduction = PAGE.read_text().partition(TABLE)[0]
    return introduction + TABLE + markdown().partition(TABLE)[2]


if __name__ == "__main__":
    PAGE.write_text(current())
