"""Time the expert block of the lk engine against the roofline of this machine and against peers.

    python benchmarks/moe_block.py --shape qwen3-30b-a3b --format bf16,int4 --peers

The roofline of a call is the time in which the machine could read the weights and scales of the
distinct experts that the tokens chose, or multiply in bf16, whichever is longer. Both rates are
measured in the same run, in turns with the timed calls, because the read bandwidth of a virtual
machine may change by half within minutes.

Every engine runs in a process of its own, which is stopped while another one runs. All engines get
the same routed batches, and weights of the same format and size. A peer that needs another PyTorch
gets its own interpreter: `--peer-python zentorch=/path/to/venv/bin/python`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# PyTorch's own threads must sleep while an engine is timed. OpenMP reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not __package__:  # Run as a script: the checkout takes the place of the script's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import importlib.util
import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.call_cost import THREADS as CALL_COST_THREADS
from benchmarks.call_cost import call_cost
from benchmarks.cases import Shape, UserError
from benchmarks.measure import Rates, Result, measure
from benchmarks.peers import MODULES
from benchmarks.peers.protocol import Died, Peer
from benchmarks.peers.settings import Refused, Settings
from benchmarks.probes import Probes, last_level_cache, machine
from benchmarks.report import Report, plot, table, write_markdown
from benchmarks.weights import FORMATS, layer_bytes
from lvllm import engine
from lvllm.engine import bank
from lvllm.machine.measure.reading import wanted_bytes

WORKING_BYTES = 1 << 30  # Memory that is needed beside the layers and the probes.
PROCESS_BYTES = 400 << 20  # Memory of an engine's interpreter with PyTorch.
MAX_LAYERS = 32
# The share of free memory that layers take at most. Peers convert weights, and allocators keep what
# was freed: after four formats, five engines had left 0.4 of 23 GiB.
LAYERS_SHARE = 0.6

console = Console(stderr=True)


def parse_list(option: str, texts: list[str], allowed: tuple[str, ...]) -> list[str]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise UserError(f"{option} is {part!r}, must be one of {', '.join(allowed)}")
    return list(dict.fromkeys(parts))


def parse_tokens(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--tokens is {text!r}, must be positive numbers such as 1,4,16")
    return [int(part) for part in parts]


def parse_pythons(texts: list[str]) -> dict[str, str]:
    pythons = {}
    for text in texts:
        name, _, python = text.partition("=")
        if name not in MODULES or name == "lk" or not python:
            peers = ", ".join(name for name in MODULES if name != "lk")
            raise UserError(f"--peer-python is {text!r}, must be NAME=PYTHON, NAME one of {peers}")
        if not os.access(python, os.X_OK):
            raise UserError(f"--peer-python: {python} is no program")
        pythons[name] = python
    return pythons


def check_folder(option: str, file: Path | None) -> None:
    if file and not file.parent.is_dir():
        raise UserError(f"{option}: there is no folder {file.parent}")


def layers_for(shape: Shape, format: str, engines: int) -> int:
    """How many layers take turns, so that at most 1 in 20 of their bytes can be in the caches."""
    layer = layer_bytes(shape, format)
    wanted = max(2, -(-20 * last_level_cache() // layer))
    probes = wanted_bytes(len(engine.info().nodes))
    available = bank.available_bytes() - WORKING_BYTES - probes - engines * PROCESS_BYTES
    # Each engine holds that many layers, and one engine at a time reorders one more.
    fitting = (available // layer - 1) // engines
    if fitting < 1:
        raise UserError(
            f"--shape {shape} in {format} needs {layer / 2**30:.1f} GiB for a layer, one for each "
            f"of {engines} engines and one to work in; {max(available, 0) / 2**30:.1f} GiB are free"
            + ("; choose fewer engines with --peer" if engines > 1 else "")
        )
    return int(min(wanted, max(1, LAYERS_SHARE * fitting), MAX_LAYERS))


@dataclass(frozen=True)
class Engine:
    peer: Peer
    formats: list[str]


class Engines:
    """The engines' processes, and notes on each of them."""

    def __init__(self, stack: ExitStack, threads: int, pythons: dict[str, str]) -> None:
        self._stack, self._threads, self._pythons = stack, threads, pythons
        self._running: dict[str, Engine] = {}
        self.notes: dict[str, str] = {}
        """The version of each engine, or why it takes no part."""

    def start_lk(self, activation_bits: int | None) -> None:
        name = "lk" if activation_bits is None else f"lk a{activation_bits}"
        self._start(name, "lk", Settings(self._threads, activation_bits))

    def start_peer(self, name: str) -> None:
        with console.status(f"starting {name}"):
            self._start(name, MODULES[name], Settings(self._threads))
        if name not in self._running:
            say(f"{name}: {self.notes[name]}")

    def _start(self, name: str, module: str, settings: Settings) -> None:
        python = self._pythons.get(name, sys.executable)
        peer = self._stack.enter_context(Peer(module, python, settings))
        try:
            self.notes[name], formats = peer.introduce()
            self._running[name] = Engine(peer, formats)
        except Refused as reason:
            self.notes[name] = str(reason)
        except Died as words:
            self.notes[name] = f"does not start: {words}"

    def prepare(self, shape: Shape, format: str) -> dict[str, Peer]:
        """Have every engine that can compute the format make random weights.

        Returns these engines. Raises UserError if lk is not one of them.
        """
        for running in self._running.values():
            running.peer.release()
        able = {n: e.peer for n, e in self._running.items() if format in e.formats}
        refused = {}
        layers = layers_for(shape, format, len(able))
        for name, peer in list(able.items()):
            with console.status(f"{shape} {format}: {layers} layers of random weights for {name}"):
                try:
                    peer.prepare(shape, format, layers, seed=1)
                    continue
                except Refused as reason:
                    refused[name] = str(reason)
                except Died as words:
                    self.drop(name, str(words))
            del able[name]
        if not any(is_lk(name) for name in able):
            raise UserError("; ".join(why for name, why in refused.items() if is_lk(name)))
        return able

    def drop(self, name: str, words: str) -> None:
        if is_lk(name):
            raise UserError(f"{name} died: {words}")
        say(f"{name} died: {words}")
        self.notes[name] += f", died: {words}"
        del self._running[name]


def is_lk(name: str) -> bool:
    return name.split()[0] == "lk"


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def compare(
    engines: Engines, shapes: list[Shape], formats: list[str], counts: list[int], budget: float
) -> Report:
    probes: Probes | None = None
    rates = Rates()
    results: list[Result] = []
    where = machine()  # Probes leave this thread one core of it.
    threads = engine.info().threads
    for shape in shapes:
        for format in formats:
            try:
                able = engines.prepare(shape, format)
            except UserError as error:
                if not results:
                    raise
                say(f"{shape} in {format} is left out: {error}")
                continue
            expert_bytes = layer_bytes(shape, format) / shape.experts
            # Probes pin this thread. They are made here, after a request may have been refused.
            probes = probes or Probes()
            for tokens in counts:
                with console.status(f"{shape} {format}: {tokens} tokens"):
                    cells, died = measure(
                        able, shape, format, tokens, threads, expert_bytes, budget, probes, rates
                    )
                results += cells
                for name, words in died.items():
                    del able[name]
                    engines.drop(name, words)
    return Report(where, engines.notes, results, rates)


def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="HxIxExK or a model's name. May be repeated.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help=f"Weight formats, a list: {', '.join(FORMATS)}. May be repeated."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Batch sizes, in tokens.")] = "1,4,16,64,512",
    threads: Annotated[int | None, typer.Option(help="Default: all physical cores.")] = None,
    activation_bits: Annotated[
        list[str] | None,
        typer.Option(help="Bits of lk's activations: 8, 16, or both to compare them."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also time every installed peer.")] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Also time these peers, a list. May be repeated.")
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PYTHON: the interpreter in which a peer is installed."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long each engine is timed for each cell of the table.")
    ] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the results to this file (needs matplotlib)."),
    ] = None,
    markdown_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--markdown",
            help="Write a table into this file, between its markers; may be given several times.",
        ),
    ] = None,
    cost: Annotated[
        bool, typer.Option("--call-cost", help="Time calls that compute next to nothing instead.")
    ] = False,
) -> None:
    """Time the expert block of the lk engine, and of peers, against the roofline."""
    try:
        shapes = [Shape.parse(text) for text in shape or ["qwen3-30b-a3b"]]
        formats = parse_list("--format", format or ["bf16"], FORMATS)
        counts = parse_tokens(tokens)
        bits = parse_list("--activation-bits", activation_bits or [], ("8", "16"))
        others = tuple(name for name in MODULES if name != "lk")
        chosen = list(others) if peers else parse_list("--peer", peer or [], others)
        pythons = parse_pythons(peer_python or [])
        for option, file in (
            ("--json", json_file),
            ("--plot", plot_file),
            *(("--markdown", file) for file in markdown_files or []),
        ):
            check_folder(option, file)
        if plot_file and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib: pip install matplotlib")
        try:
            engine.configure(threads=CALL_COST_THREADS if cost and threads is None else threads)
        except ValueError as error:
            raise UserError(f"--threads: {error}") from None
        threads = engine.info().threads
        torch.set_num_threads(threads)
        if cost:
            print(json.dumps(call_cost(threads), indent=2))
            return
        with ExitStack() as stack:
            engines = Engines(stack, threads, pythons)
            for value in bits or ["default"]:
                engines.start_lk(None if value == "default" else int(value))
            for name in chosen:
                engines.start_peer(name)
            report = compare(engines, shapes, formats, counts, seconds)
        # A pipe has no width, and the table needs 100 columns.
        Console(width=None if sys.stdout.isatty() else 120).print(table(report))
        if json_file:
            json_file.write_text(report.json())
        if plot_file:
            plot(report, plot_file)
        for file in markdown_files or []:
            write_markdown(report, file)
    except (UserError, MemoryError, ValueError) as error:
        # The engine's own errors are one line each as well.
        say(f"error: {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)
