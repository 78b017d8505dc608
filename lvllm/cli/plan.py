"""`lvllm plan`: whether a model fits, where it goes, how fast it is, and how to start it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from lvllm import documents
from lvllm.cli.measuring import this_report
from lvllm.cli.sizes import size
from lvllm.errors import LvllmError, readable
from lvllm.machine.report import MachineReport
from lvllm.planning import gguf_shape, shape, source
from lvllm.planning.choice import choose
from lvllm.planning.data import as_data
from lvllm.planning.description import Description, machine_of
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import CPUS
from lvllm.planning.measured import of_report
from lvllm.planning.placement import Load
from lvllm.planning.text import lines
from lvllm.settings.use_weight import UseWeight

MOST_BYTES = 1 << 20
"""Of a report. That of a small machine has 5 KB."""
MODEL = "The model: a folder with config.json, an id on the hub, or a GGUF file or its folder."

AllowInt4 = Annotated[
    bool, typer.Option("--allow-int4", help="Experts may be rounded to 4 bits while loading.")
]
AllowInt8 = Annotated[
    bool,
    typer.Option(
        "--allow-int8",
        help="Experts may be rounded to 8-bit integers while loading, and without a GPU all other"
        " weights too.",
    ),
]
AllowFp8 = Annotated[
    bool,
    typer.Option("--allow-fp8", help="Experts may be rounded to 8-bit floats while loading."),
]


def plan(
    model: Annotated[str, typer.Argument(help=MODEL)],
    users: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt; 2048 unless the context is shorter."),
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer; 256 unless the context is shorter."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="The longest context in tokens; 8192 unless the model has less."),
    ] = None,
    allow_int4: AllowInt4 = False,
    allow_int8: AllowInt8 = False,
    allow_fp8: AllowFp8 = False,
    ram: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="The host's memory: 512G.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores that compute.")] = None,
    numa: Annotated[int | None, typer.Option(min=1, help="NUMA nodes.")] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.1, help="GB/s that all cores together read from memory."),
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(CPUS)}."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="The number of GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The kind of GPU: rtx-4090, h100.")] = None,
    gpu_memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Memory of each GPU: 24G.")
    ] = None,
    bus: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s that a GPU reads from the host.")
    ] = None,
    machine_file: Annotated[
        Path | None,
        typer.Option("--machine", help="What `lvllm doctor --json` printed on the machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a model fits, where its weights go, how fast it will be, and how to start it.

    This reads config.json and the headers of the weights' files, if they are there, or the header
    of a GGUF file, and no weight. What no option describes of the machine is measured here.
    docs/plan.md explains each line.

    The exit code is 0 if the model fits, and 1 if it does not.
    """
    given = Description(ram, cores, numa, bandwidth, isa, gpus, gpu, gpu_memory, bus)
    try:
        found = _model(model)
        machine = machine_of(given, lambda: of_report(_report(machine_file)))
        load = _load(found, users, prompt, answer, context)
        experts = (UseWeight.KEEP, *allowed_experts(allow_int4, allow_int8, allow_fp8))
        result = choose(found, machine, load, experts=experts, int8_linear=allow_int8)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    if as_json:
        print(json.dumps(as_data(result), indent=2))
    else:
        print("\n".join(lines(result)))
    sys.stdout.flush()
    raise typer.Exit(0 if result.best else 1)


def allowed_experts(int4: bool, int8: bool, fp8: bool) -> tuple[UseWeight, ...]:
    """The formats to which the options allow experts to be rounded, the smallest first."""
    asked = {UseWeight.INT4: int4, UseWeight.INT8: int8, UseWeight.FP8: fp8}
    return tuple(use for use, allowed in asked.items() if allowed)


def _model(model: str) -> shape.ModelShape:
    """The shape of the model that the user named."""
    if file := source.gguf_of(model):
        return gguf_shape.of_file(file, model)
    return shape.of_folder(source.folder_of(model), model)


def _load(
    model: shape.ModelShape,
    users: int,
    prompt: int | None,
    answer: int | None,
    context: int | None,
) -> Load:
    """The load, whose context holds a prompt and an answer."""
    longest = context or model.context
    if answer is None:
        left = longest - prompt if prompt else longest // 8
        answer = max(1, min(Load.answer, left))
    if prompt is None:
        prompt = max(1, min(Load.prompt, longest - answer))
    needed = prompt + answer
    wanted = context or max(needed, min(Load.context, model.context))
    if wanted > model.context:
        named = "--context" if context else "--prompt and --answer"
        raise PlanError(f"{named}: {wanted} tokens; {model.name} was made for {model.context}")
    if wanted < needed:
        raise PlanError(f"--context {wanted}: --prompt and --answer are {needed} tokens together")
    return Load(prompt=prompt, answer=answer, users=users, context=wanted)


def _report(path: Path | None) -> MachineReport:
    """The report in a file, or about this machine."""
    if path is None:
        return this_report()
    where = f"--machine {readable(str(path))}"
    try:
        return MachineReport.model_validate_json(documents.read_text(path, MOST_BYTES))
    except documents.DocumentError as error:
        raise PlanError(f"{where}: {error}") from None
    except ValidationError:
        raise PlanError(f"{where}: not what `lvllm doctor --json` prints") from None
