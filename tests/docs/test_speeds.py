"""The READMEs' speeds are those of the table of docs/performance.md."""

import re

import pytest

from tests.docs.pages import ROOT

TOKENS = ("1", "64", "512")
DEFAULT = {"bf16": "lk a16", "int8": "lk a16", "int4": "lk a8"}
"""lk's engine with the bits of activations that each format has by default."""
PEERS = ("llama.cpp", "vllm-sgl")


def milliseconds() -> dict[tuple[str, str, str], float]:
    """Format, engine and number of tokens: how long a call takes."""
    text = (ROOT / "docs/performance.md").read_text()
    table = re.search(r"<!-- moe_block: begin -->(.*)<!-- moe_block: end -->", text, re.DOTALL)
    assert table is not None
    rows = [line.strip("| ").split(" | ") for line in table[1].splitlines() if "|" in line]
    header = rows[0]
    assert header[:2] == ["format", "engine"]
    return {
        (row[0], row[1], tokens): float(cell.strip("*").partition(" ")[0])
        for row in rows[2:]
        for tokens, cell in zip(header[2:], row[2:], strict=True)
    }


@pytest.mark.parametrize("readme", ["README.md", "README_cn.md"])
def test_the_readmes_say_what_was_measured(readme: str) -> None:
    text, took = (ROOT / readme).read_text(), milliseconds()
    for weights in ("int4", "bf16"):
        cells = [
            " / ".join(
                f"{took[weights, peer, tokens] / took[weights, DEFAULT[weights], tokens]:.2f}"
                for peer in PEERS
            )
            for tokens in TOKENS
        ]
        assert " | ".join(cells) in text
    zentorch = took["int8", DEFAULT["int8"], "512"] / took["int8", "zentorch", "512"]
    assert re.search(rf"zentorch .*\b{zentorch:.2f}\b", text)
