"""`lvllm tune`: look for settings that are faster on this machine than the plan's."""

import itertools
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lvllm.bench.load import Endpoint, LoadGenerator
from lvllm.bench.logs import log_folder
from lvllm.bench.measure import Grid
from lvllm.bench.servers import launch_for, measured
from lvllm.cli.measuring import this_machine
from lvllm.cli.plan import AllowFp8, AllowInt4, AllowInt8, allowed_experts
from lvllm.cli.serving_arguments import CONTEXT, Arguments
from lvllm.errors import LvllmError
from lvllm.evaluation.likelihood import Comparison
from lvllm.serving.launch import Launch
from lvllm.settings.variables import SettingError
from lvllm.tuning.config import config_yaml, environment_of
from lvllm.tuning.knobs import Allowed, knobs
from lvllm.tuning.quality import Quality
from lvllm.tuning.search import Knob, Outcome, search

__all__ = ["CONTEXT", "tune"]


def tune(
    arguments: Arguments = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="How long to try; a trial that has begun is finished.")
    ] = 30,
    users: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each user in a trial.")] = 2,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file for `vllm serve --config`.")
    ] = Path("tuned.yaml"),
    allow_int4: AllowInt4 = False,
    allow_int8: AllowInt8 = False,
    allow_fp8: AllowFp8 = False,
    allow_activation_bits: Annotated[
        bool,
        typer.Option("--allow-activation-bits", help="Activations may have other bits than now."),
    ] = False,
) -> None:
    """Try settings around the plan with real requests, and write the fastest to a file.

    A setting that you give stays as it is. Those that change results are tried only if they are
    allowed, and their cost in quality is printed. The winner and the plan take turns in the end; if
    it is not faster each time, the plan is written. docs/tune.md says what is tried.
    """
    experts = allowed_experts(allow_int4, allow_int8, allow_fp8)
    allowed = Allowed(experts, allow_int8, allow_activation_bits)
    console = Console(stderr=True, highlight=False)
    try:
        if output.exists():
            raise SettingError(f"--output {output}: the file exists")
        if not output.parent.is_dir():
            raise SettingError(f"--output {output}: there is no folder {output.parent}")
        launch = launch_for(arguments or [], os.environ, this_machine, users)
        if "api-key" in launch.given.options:
            raise SettingError("--api-key: leave it out, only this command uses its servers")
        launch.environment.pop("VLLM_API_KEY", None)
        if launch.plan is None or launch.plan.best is None:
            lacks = f": {launch.plan.lacks}" if launch.plan else f": {launch.notes[-1]}"
            raise SettingError(f"there is no plan to begin with{lacks}")
        for note in launch.notes:
            console.print(f"lvllm: {note}", markup=False, soft_wrap=True)
        tried = knobs(launch.given, launch.plan, launch.plan.best, allowed)
        grid = Grid((prompt,), (users,), answer, rounds)
        with log_folder("lvllm-tune-") as logs:
            found, cost = _search(console, launch, tried, grid, 60 * minutes, logs)
        _show(found, cost)
        text = config_yaml(launch, found.best, found.gain)
        command = _command(launch, found.best, output)
        output.write_text(f"# {command}\n{text}")
        print(f"{output} is written. It is served by\n\n    {command}")
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except OSError as error:
        raise SystemExit(f"lvllm: --output {output}: {error.strerror}") from None


def _search(
    console: Console,
    launch: Launch,
    tried: Sequence[Knob],
    grid: Grid,
    seconds: float,
    logs: Path,
) -> tuple[Outcome, Comparison | None]:
    """What a search finds, and what its best settings cost in quality if they change results."""
    console.print(f"lvllm: logs are in {logs}", markup=False, soft_wrap=True)
    inexact = {knob.name for knob in tried if knob.changes_results}
    quality = Quality()
    numbers = itertools.count(1)
    begin = time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with LoadGenerator(logs / "load.log") as load, Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=seconds)

        def run(changes: Mapping[str, str], confirming: bool) -> float:
            name = _named(changes)

            def say(text: str) -> None:
                spent = time.monotonic() - begin
                bar.update(task, completed=spent, description=f"{name}: {text}"[:60])

            def ask(to: Endpoint) -> None:
                quality.ask(to, plan=not changes)

            one = replace(launch, environment=launch.environment | dict(changes))
            log = logs / f"{next(numbers)}.log"
            also = ask if confirming and inexact else None
            return measured(one, load, grid, log, say, also)[0].output_rate

        found = search(tried, run, lambda: seconds - (time.monotonic() - begin))
    return found, quality.cost if inexact & set(found.best) else None


def _named(changes: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "the plan"


def _show(found: Outcome, cost: Comparison | None) -> None:
    table = Table(box=SIMPLE)
    for name in ("settings", "tokens/s", "of the plan"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    plan = found.trials[0].rate
    for trial in found.trials:
        if trial.failure is None:
            rates = (f"{trial.rate:.1f}", f"{trial.rate / plan:.2f}")
        else:
            rates = ("-", "-")
        table.add_row(Text(_named(trial.changes)), *rates)
    Console(highlight=False).print(table)
    for trial in found.trials:
        if trial.failure is not None:
            print(f"{_named(trial.changes)}: {trial.failure}")
    if not found.complete:
        print("The time was up before everything was tried: --minutes gives more.")
    turns = " and ".join(f"{gain:.2f}" for gain in found.gains)
    if found.best:
        print(f"{_named(found.best)} had {turns} times the plan's rate, taking turns with it.")
    elif turns:
        print(f"The fastest one had {turns} times the plan's rate, taking turns with it. So the")
        print("plan's settings stay.")
    else:
        print("Nothing was faster than the plan's settings.")
    if cost is not None:
        error = cost.divergences.std() / math.sqrt(len(cost.divergences))
        print(
            f"It costs {cost.divergence:.4f} nats a token (KL divergence, give or take"
            f" {error:.4f}), and the most probable token is the same in {cost.agreement:.1%} of"
            f" {len(cost.divergences)} places of the model's own answers."
        )


def _command(launch: Launch, changes: Mapping[str, str], output: Path) -> str:
    """How the file is served."""
    variables = [
        f"{name}={shlex.quote(value)}" for name, value in environment_of(launch, changes).items()
    ]
    return " ".join([*variables, "vllm serve --config", shlex.quote(str(output))])
