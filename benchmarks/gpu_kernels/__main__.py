"""Prints what the kernels of experts take on each architecture of GPUs, without a GPU.

    python -m benchmarks.gpu_kernels [--formats bf16,int4]

The table has the registers of a thread, the bytes of them that are spilled to memory, and the
shared memory of a block, of the products with w13 / with w2. There is a row for each format and
each number of rows that a block may have.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_kernels.compiled import SHARED_KIB, compile_launch
from benchmarks.gpu_kernels.launches import launches
from lvllm.engine.weight_formats import ALL_FORMATS
from lvllm.gpu.kernels import BLOCK_ROWS


def main(formats: Annotated[str, typer.Option()] = ",".join(ALL_FORMATS)) -> None:
    """Print what the kernels of experts take on each architecture of GPUs."""
    table = Table("format", "rows", *(f"sm_{architecture}" for architecture in SHARED_KIB))
    for format in formats.split(","):
        for rows in BLOCK_ROWS:
            gate_up, down, *_ = launches(format, tokens_per_expert=rows)
            cells = []
            for architecture in SHARED_KIB:
                taken = [compile_launch(launch, architecture) for launch in (gate_up, down)]
                registers = " / ".join(str(one.registers) for one in taken)
                shared = " / ".join(f"{one.shared / 1024:.0f}" for one in taken)
                spilled = " / ".join(str(one.spilled) for one in taken)
                cells.append(f"{registers}, {spilled}, {shared} KiB")
            table.add_row(format, str(rows), *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
