"""`lvllm export`: a checkpoint with its experts quantised."""

from pathlib import Path
from typing import Annotated

import typer

from lvllm.export.schemes import FORMATS, GROUP_SIZE


def export(
    model: Annotated[Path, typer.Argument(help="A folder with an unquantised checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; new or empty.")],
    format: Annotated[
        str, typer.Option(help="What the experts become.", metavar="|".join(FORMATS))
    ],
    group_size: Annotated[
        int, typer.Option(help="Of int4: weights that share a scale; 32, 64 or 128.")
    ] = GROUP_SIZE,
    linears: Annotated[
        bool,
        typer.Option(
            "--linears", help="Quantise attention, dense layers and shared experts as well."
        ),
    ] = False,
) -> None:
    """Quantise the experts of MODEL and write a compressed-tensors checkpoint.

    A second start goes on with an export that was killed. docs/export.md says what loads it.
    """
    from lvllm.export import ExportError
    from lvllm.export import export as write

    try:
        write(model, out, format=format, group_size=group_size, linears=linears)
    except ExportError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except OSError as error:
        raise SystemExit(f"lvllm: {error.filename or out}: {error.strerror}") from None
