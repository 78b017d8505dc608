"""`lvllm export` writes a checkpoint whose experts are quantised."""

from pathlib import Path
from typing import Annotated

import typer

from lvllm.export.schemes import FORMATS, GROUP_SIZE


def export(
    model: Annotated[Path, typer.Argument(help="The folder of an unquantised checkpoint.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The folder to write, which must be new or empty.")
    ],
    format: Annotated[
        str, typer.Option(help="The format of the exported experts.", metavar="|".join(FORMATS))
    ],
    group_size: Annotated[
        int, typer.Option(help="For int4: how many weights share a scale: 32, 64 or 128.")
    ] = GROUP_SIZE,
    linears: Annotated[
        bool,
        typer.Option("--linears", help="Quantise attention, dense layers and shared experts, too."),
    ] = False,
) -> None:
    """Quantise the experts of MODEL and write a compressed-tensors checkpoint.

    If an export was killed, the same command goes on with it. docs/export.md says what can load the
    result.
    """
    from lvllm.export import ExportError
    from lvllm.export import export as write

    try:
        write(model, out, format=format, group_size=group_size, linears=linears)
    except ExportError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except OSError as error:
        raise SystemExit(f"lvllm: {error.filename or out}: {error.strerror}") from None
