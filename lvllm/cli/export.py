"""`lvllm export` writes a checkpoint whose experts are quantised."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from lvllm.export.schemes import FORMATS, GROUP_SIZE, Format
from lvllm.rules import first_fault


def export(
    model: Annotated[
        Path,
        typer.Argument(
            help="The folder of an unquantised checkpoint, or a GGUF file or its folder."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The folder to write, which must be new or empty.")
    ],
    format: Annotated[
        str | None,
        typer.Option(help="The format of the exported experts.", metavar="|".join(FORMATS)),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="For int4: how many weights share a scale: 32, 64 or 128.")
    ] = GROUP_SIZE,
    linears: Annotated[
        bool,
        typer.Option("--linears", help="Quantise attention, dense layers and shared experts, too."),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Write the tokenizer of this folder, in the place of MODEL's."),
    ] = None,
    dtype_config: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --format: a YAML file of rules that give modules their formats.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Quantise the experts of MODEL and write a compressed-tensors checkpoint.

    If an export was killed, the same command goes on with it. docs/export.md says what can load the
    result.

    The file of --dtype-config is a list. Each entry has a regular expression, which is looked for
    in the names of modules in MODEL, and a format. The first expression that matches counts, and
    what none matches stays as it is:

    \b
    - 'layers\\.(0|1)\\.mlp\\.experts': fp8
    - '\\.experts\\.': {format: int4, group_size: 64}
    - 'layers\\.0\\.self_attn': keep
    - 'self_attn': int8
    """
    from lvllm.export import ExportError
    from lvllm.export import export as write
    from lvllm.export.dtype_config import read

    try:
        if dtype_config is not None:
            group = group_size if group_size != GROUP_SIZE else None
            for name, given in {"format": format, "group-size": group, "linears": linears}.items():
                if given:
                    raise ExportError(
                        f"--{name} does not go with --dtype-config, whose file says that: leave one"
                        " of them out"
                    )
            write(model, out, format=read(dtype_config), tokenizer=tokenizer)
        elif format not in FORMATS:
            fault = "is missing" if format is None else f"{format} is not allowed"
            raise ExportError(f"--format {fault}: {', '.join(FORMATS)}")
        else:
            how = Format(format=format, group_size=group_size)
            write(model, out, format=how, linears=linears, tokenizer=tokenizer)
    except ExportError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except ValidationError as error:
        raise SystemExit(f"lvllm: --group-size: {first_fault(error)}") from None
    except OSError as error:
        raise SystemExit(f"lvllm: {error.filename or out}: {error.strerror}") from None
