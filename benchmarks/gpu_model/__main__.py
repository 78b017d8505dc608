"""Prints docs/gpu-model.md: `python -m benchmarks.gpu_model > docs/gpu-model.md`."""

from pathlib import Path
from string import Template

from benchmarks.gpu_model import answers, tables

PAGE = Path(__file__).with_name("page.txt")


def page() -> str:
    """The whole page. It takes some minutes."""
    return Template(PAGE.read_text()).substitute(
        machines=tables.machines(),
        predictions=tables.predictions(),
        decoding=tables.decoding(),
        others=tables.others(),
        staging=answers.staging(),
        shared=answers.shared_batches(),
        break_evens=answers.break_evens(),
        sensitivity=answers.sensitivity(),
    )


if __name__ == "__main__":
    print(page(), end="")
