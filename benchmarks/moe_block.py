"""Times the expert block of the lk engine against the roofline of this machine.

    python benchmarks/moe_block.py --shape qwen3-30b-a3b --tokens 1,4,16,512 --json results.json

The roofline of a call is the time in which the machine could read the weights of the distinct
experts that its tokens chose, or do its multiplications, whichever is longer. Both rates are
measured in the same run, in turns with the timed calls, since the read bandwidth of a virtual
machine may change by half within minutes.
"""

from __future__ import annotations

import os

# PyTorch's own threads must sleep while the engine is timed; read when OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from lvllm import bank, engine

# hidden x intermediate x experts x top-k of the routed experts.
SHAPES = {
    "qwen3-30b-a3b": "2048x768x128x8",
    "qwen3-235b-a22b": "4096x1536x128x8",
    "qwen3-next-80b-a3b": "2048x512x512x10",
    "mixtral-8x7b": "4096x14336x8x2",
    "deepseek-v2-lite": "2048x1408x64x6",
    "deepseek-v3": "7168x2048x256x8",
    "deepseek-v3-32": "7168x2048x32x8",  # an eighth of its experts, for smaller machines
    "glm-4.5-air": "4096x1408x128x8",
    "gpt-oss-20b": "2880x2880x32x4",
    "olmoe-1b-7b": "2048x1024x64x8",
    "tiny": "64x32x4x2",
}

MIN_SECONDS = 2.0  # of timed calls a cell
MIN_ROUNDS, MAX_ROUNDS = 5, 60
PROBE_BYTES = 256 << 20
PEAK_SIZE = 1536  # of the square matrices whose product gives the matrix peak
REFERENCE_TOKENS = 16  # whose error is measured

console = Console(stderr=True)


class UserError(Exception):
    """One line for the user."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    topk: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", SHAPES.get(text.lower(), text))
        if not match:
            raise UserError(
                f"--shape is {text!r}, must be HxIxExK (hidden, intermediate, experts, top-k; "
                f"2048x768x128x8) or one of {', '.join(SHAPES)}"
            )
        shape = cls(*(int(part) for part in match.groups()))
        if min(asdict(shape).values()) < 1:
            raise UserError(f"--shape is {text!r}, every size must be at least 1")
        if shape.topk > shape.experts:
            raise UserError(f"--shape is {text!r}: top-{shape.topk} of {shape.experts} experts")
        return shape

    def __str__(self) -> str:
        return "x".join(str(size) for size in asdict(self).values())

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    def layer_bytes(self, dtype: torch.dtype) -> int:
        return self.experts * self.expert_weights * dtype.itemsize


@dataclass(frozen=True)
class Result:
    shape: str
    format: str
    tokens: int
    threads: int
    ms: float
    """Median of a call."""
    gb_s: float
    """Bytes of the distinct experts' weights over that time."""
    gflop_s: float
    roofline: float
    """Time that the machine's rates allow over the time taken: 1 is all that it can do."""
    error: float
    """Relative Frobenius error against float32 PyTorch on the same weights and inputs."""


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, parts: int) -> torch.Tensor:
    """Normal values of variance 1/columns in the engine's memory.

    Blocks of 8 Mi values are repeated: drawing each value of a large layer would take a minute.
    """
    tensor = bank.allocate(shape, dtype, parts=parts)
    flat = tensor.view(-1)
    size = min(flat.numel(), (8 << 20) + 7)  # no multiple of a row, so that rows differ
    block = torch.randn(size).mul_(shape[-1] ** -0.5).to(dtype)
    for begin in range(0, flat.numel(), size):
        end = min(begin + size, flat.numel())
        flat[begin:end] = block[: end - begin]
    return tensor


@dataclass(frozen=True)
class Weights:
    w13: torch.Tensor
    w2: torch.Tensor
    layer: engine.ExpertLayer

    @classmethod
    def random(cls, shape: Shape, format: str) -> Weights:
        dtype = engine.DTYPES[format]
        w13 = random_tensor((shape.experts, 2 * shape.intermediate, shape.hidden), dtype, 2)
        w2 = random_tensor((shape.experts, shape.hidden, shape.intermediate), dtype, 1)
        return cls(w13, w2, engine.ExpertLayer(format=format, w13=w13, w2=w2))


@dataclass(frozen=True)
class Routed:
    """A batch with its routing."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, tokens: int, dtype: torch.dtype) -> Routed:
        scores = torch.randn(tokens, shape.experts)
        weights, ids = torch.softmax(scores, dim=-1).topk(shape.topk)
        weights /= weights.sum(dim=-1, keepdim=True)
        return cls(torch.randn(tokens, shape.hidden).to(dtype), ids.int(), weights)


def reference(weights: Weights, batch: Routed, tokens: int) -> torch.Tensor:
    """The first tokens' outputs in float32."""
    out = torch.zeros(tokens, batch.x.shape[1])
    x = batch.x[:tokens].float()
    for expert in batch.ids[:tokens].unique().tolist():
        token, slot = torch.where(batch.ids[:tokens] == expert)
        gate, up = (x[token] @ weights.w13[expert].float().T).chunk(2, dim=-1)
        down = (torch.nn.functional.silu(gate) * up) @ weights.w2[expert].float().T
        out.index_add_(0, token, down * batch.weights[token, slot, None])
    return out


def seconds(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


class Probes:
    """The machine's rates, measured by PyTorch on as many threads as the engine has."""

    def __init__(self, weights: list[Weights]) -> None:
        memory = [w.w13.view(-1).view(torch.int16) for w in weights]
        self._memory = [m[: m.numel() // 4 * 4].view(torch.int64) for m in memory]
        # Too little weight to be out of the caches: read something else.
        if sum(m.numel() * 8 for m in self._memory) < PROBE_BYTES:
            self._memory = [torch.ones(PROBE_BYTES // 8, dtype=torch.int64)]
        self._turn = 0
        # bf16 where the CPU multiplies it, float32 where that is faster.
        self._operands = [
            torch.randn(2, PEAK_SIZE, PEAK_SIZE).to(dtype)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        for a, b in self._operands:
            a @ b

    def read_rate(self) -> float:
        """Bytes a second of one sequential reader a thread, over up to 256 MiB of weights."""
        memory = self._memory[self._turn % len(self._memory)]
        words = min(memory.numel(), PROBE_BYTES // 8)
        begin = (self._turn * 7919 * 4096) % (memory.numel() - words + 1)
        self._turn += 1
        chunk = memory[begin : begin + words]
        return words * 8 / seconds(chunk.sum)

    def matrix_rate(self) -> float:
        """Operations a second of a square matrix product."""
        return max(2 * PEAK_SIZE**3 / seconds(torch.matmul, a, b) for a, b in self._operands)


def layers_for(shape: Shape, dtype: torch.dtype) -> int:
    """How many layers to rotate so that one's weights have left the caches when its turn comes."""
    wanted = max(2, -(-4 * last_level_cache() // shape.layer_bytes(dtype)))
    available = bank.available_bytes() - (1 << 30)
    fitting = available // shape.layer_bytes(dtype)
    if fitting < 1:
        raise UserError(
            f"--shape {shape} needs {shape.layer_bytes(dtype) / 2**30:.1f} GiB for one layer and "
            f"1 GiB to work in; {bank.available_bytes() / 2**30:.1f} GiB are free"
        )
    return int(min(wanted, fitting, 256))


def last_level_cache() -> int:
    """Bytes of all last-level caches; 32 MiB if the system does not say."""
    caches: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (index / "size").read_text().strip()
            caches[(index / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(caches.values()) or 32 << 20


def measure(
    shape: Shape, format: str, tokens: int, layers: list[Weights], probes: Probes
) -> tuple[Result, list[float], list[float]]:
    """One cell of the table, and the rates measured beside it."""
    dtype = engine.DTYPES[format]
    batches = [Routed.random(shape, tokens, dtype) for _ in range(8)]
    first = layers[0].layer(batches[0].x, batches[0].ids, batches[0].weights)
    checked = min(tokens, REFERENCE_TOKENS)
    wanted = reference(layers[0], batches[0], checked)
    error = float((first[:checked].float() - wanted).norm() / wanted.norm())

    times: list[float] = []
    fractions: list[float] = []
    gb_s: list[float] = []
    reads: list[float] = []
    peaks: list[float] = []
    flops = 2 * tokens * shape.topk * shape.expert_weights
    # A round of calls takes about 50 ms, so that the probes beside it saw the same machine.
    once = seconds(layers[-1].layer, batches[0].x, batches[0].ids, batches[0].weights)
    calls = max(1, min(len(layers), int(0.05 / once)))
    spent = 0.0
    turn = 0
    while len(reads) < MAX_ROUNDS and (len(reads) < MIN_ROUNDS or spent < MIN_SECONDS):
        reads.append(probes.read_rate())
        if len(peaks) < 5 or len(reads) % 10 == 0:
            peaks.append(probes.matrix_rate())
        for _ in range(calls):
            layer, batch = layers[turn % len(layers)].layer, batches[turn % len(batches)]
            took = seconds(layer, batch.x, batch.ids, batch.weights)
            bytes_read = int(batch.ids.unique().numel()) * shape.expert_weights * dtype.itemsize
            limit = max(bytes_read / reads[-1], flops / statistics.median(peaks))
            times.append(took)
            gb_s.append(bytes_read / took / 1e9)
            fractions.append(limit / took)
            spent += took
            turn += 1
    ms = statistics.median(times) * 1e3
    result = Result(
        shape=str(shape),
        format=format,
        tokens=tokens,
        threads=engine.info().threads,
        ms=ms,
        gb_s=statistics.median(gb_s),
        gflop_s=flops / ms / 1e6,
        roofline=statistics.median(fractions),
        error=error,
    )
    return result, reads, peaks


def machine(read_rates: list[float], matrix_rates: list[float]) -> dict[str, object]:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    info = engine.info()
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "physical_cores": engine.topology().physical_cores,
        "numa_nodes": list(info.nodes),
        "threads": info.threads,
        "isa": info.isa,
        "huge_pages": info.huge_pages,
        "last_level_cache_bytes": last_level_cache(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "read_gb_s": statistics.median(read_rates) / 1e9,
        "read_gb_s_range": [min(read_rates) / 1e9, max(read_rates) / 1e9],
        "matrix_gflop_s": statistics.median(matrix_rates) / 1e9,
    }


def table(results: list[Result], about: dict[str, object]) -> Table:
    title = (
        f"{about['cpu']}, {about['isa']}, {about['threads']} threads; read "
        f"{about['read_gb_s']:.1f} GB/s, matrix {about['matrix_gflop_s']:.0f} GFLOP/s"
    )
    view = Table(title=title, box=None, padding=(0, 1), title_justify="left")
    for name in ("shape", "format", "tokens", "ms", "GB/s", "GFLOP/s", "roofline", "error"):
        view.add_column(name, justify="right", no_wrap=True)
    for r in results:
        view.add_row(
            r.shape,
            r.format,
            str(r.tokens),
            f"{r.ms:.3f}",
            f"{r.gb_s:.1f}",
            f"{r.gflop_s:.0f}",
            f"{r.roofline:.0%}",
            f"{r.error:.1e}",
        )
    return view


def parse_tokens(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--tokens is {text!r}, must be positive numbers such as 1,4,16")
    return [int(part) for part in parts]


def run(
    shapes: list[str], format: str, tokens: str, threads: int | None, json_file: Path | None
) -> None:
    parsed = [Shape.parse(shape) for shape in shapes]
    counts = parse_tokens(tokens)
    if format not in engine.DTYPES:
        raise UserError(f"--format is {format!r}, must be one of {', '.join(engine.DTYPES)}")
    if json_file and not json_file.parent.is_dir():
        raise UserError(f"--json: there is no folder {json_file.parent}")
    try:
        engine.configure(threads=threads)
    except ValueError as error:
        raise UserError(f"--threads: {error}") from None
    torch.set_num_threads(engine.info().threads)
    torch.manual_seed(0)

    results: list[Result] = []
    read_rates: list[float] = []
    matrix_rates: list[float] = []
    for shape in parsed:
        count = layers_for(shape, engine.DTYPES[format])
        with console.status(f"{shape}: filling {count} layers with random weights"):
            layers = [Weights.random(shape, format) for _ in range(count)]
            probes = Probes(layers)
        for batch_tokens in counts:
            with console.status(f"{shape} {format}: {batch_tokens} tokens"):
                result, reads, peaks = measure(shape, format, batch_tokens, layers, probes)
            results.append(result)
            read_rates += reads
            matrix_rates += peaks
        del layers, probes
    about = machine(read_rates, matrix_rates)
    Console().print(table(results, about))
    if json_file:
        report = {"machine": about, "results": [asdict(result) for result in results]}
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="HxIxExK or a model's name; may be repeated.")
    ] = None,
    format: Annotated[str, typer.Option(help="Weight format: bf16 or fp16.")] = "bf16",
    tokens: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4,16,64,512",
    threads: Annotated[int | None, typer.Option(help="Default: all physical cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Times the expert block of the lk engine against the roofline of this machine."""
    try:
        run(shape or ["qwen3-30b-a3b"], format, tokens, threads, json_file)
    except (UserError, MemoryError, ValueError) as error:
        # The engine's own errors are one line each, too.
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)
