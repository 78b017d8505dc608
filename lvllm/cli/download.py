"""`lvllm download`: fetch a model, and say before whether it fits."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import constants

from lvllm.cli.measuring import this_machine
from lvllm.errors import LvllmError
from lvllm.hub.repository import HubError, Repository, open_repository, source_by_environment
from lvllm.planning import shape
from lvllm.planning.choice import choose
from lvllm.planning.placement import Load
from lvllm.units import amount


def download(
    model: Annotated[str, typer.Argument(help="An id on the hub: OWNER/NAME.")],
    include: Annotated[
        list[str] | None, typer.Option(help="Only files that match; may be given several times.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No files that match; may be given several times.")
    ] = None,
    source: Annotated[
        str, typer.Option(help="hf or modelscope.", show_default="as VLLM_USE_MODELSCOPE says")
    ] = "",
    to: Annotated[
        Path | None, typer.Option(help="The folder for the files.", show_default="the hub's cache")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch a model that does not fit into memory, too.")
    ] = False,
) -> None:
    """Fetch a model from a hub; the same command goes on with a download that stopped.

    Before anything large is fetched, the disk and the memory of this machine are looked at.
    """
    try:
        if source not in ("", "hf", "modelscope"):
            raise HubError(f"--source {source}: allowed are hf and modelscope")
        chosen = source_by_environment() if source == "" else source
        found = open_repository(model, chosen, include or (), exclude or ())  # type: ignore[arg-type]
        _check_disk(found, to)
        _check_memory(found, to, force)
        folder = found.fetch(to)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("lvllm: stopped; the same command goes on from here") from None
    print(folder)


def _check_disk(found: Repository, to: Path | None) -> None:
    """Say how large the files are. Raises HubError if the disk is too small for them."""
    folder = (to or Path(constants.HF_HUB_CACHE)).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    present = sum(
        min(size, path.stat().st_size)
        for name, size in found.sizes.items()
        if to is not None and (path := to / name).is_file()
    )
    say(f"{len(found.sizes)} files, {amount(found.bytes)}; the disk has {amount(free)} free")
    if found.bytes - present > free:
        raise HubError(
            f"{found.name}: {amount(found.bytes - present)} do not fit on the disk of {there},"
            f" which has {amount(free)} free"
        )


def _check_memory(found: Repository, to: Path | None, force: bool) -> None:
    """Plan with the model's config.json. Raises HubError if the model does not fit."""
    if "config.json" not in found.sizes:
        return
    folder = found.fetch(to, only=["config.json"])
    try:
        model = shape.of_config(shape.read_config(folder), found.name)
        plan = choose(model, this_machine(), Load(context=min(Load.context, model.context)))
    except LvllmError as error:
        say(f"no plan: {error}")
        return
    if best := plan.best:
        rate = best.speed.decode_rate
        say(f"it fits here: {best.name}, {rate:.1f} tokens/s expected for one user")
    elif not force:
        raise HubError(
            f"{found.name} does not fit here: {plan.candidates[0].memory.lacks};"
            " --force fetches it anyway"
        )


def say(text: str) -> None:
    typer.echo(f"lvllm: {text}", err=True)
