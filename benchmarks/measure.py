"""Time engines in turns, and measure the machine's rates in between."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.cases import Shape, routing, seeds
from benchmarks.peers.protocol import Died, Peer
from benchmarks.probes import Probes

TURN_SECONDS = 0.05  # Short, so that the machine's rates are about those measured next to it.
MIN_ROUNDS, MAX_ROUNDS = 5, 60


@dataclass(frozen=True)
class Result:
    shape: str
    format: str
    engine: str
    tokens: int
    threads: int
    ms: float
    """Milliseconds of a call, the median."""
    gb_s: float
    """Bytes of the distinct experts' weights and scales, divided by that time."""
    gflop_s: float
    roofline: float
    """The time that the machine's rates allow, divided by the time taken: 1 is the best."""
    error: float
    """Relative Frobenius error against float32 on the dequantised weights."""


@dataclass
class Rates:
    """The measured rates, in bytes and operations a second."""

    read: list[float] = field(default_factory=list)
    matrix: list[float] = field(default_factory=list)


@dataclass
class _Times:
    name: str
    peer: Peer
    error: float
    once: float
    seconds: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def calls(self) -> int:
        return max(1, min(32, int(TURN_SECONDS / min([self.once, *self.seconds]))))


def measure(
    peers: dict[str, Peer],
    shape: Shape,
    format: str,
    tokens: int,
    threads: int,
    expert_bytes: float,
    budget: float,
    probes: Probes,
    rates: Rates,
) -> tuple[list[Result], dict[str, str]]:
    """Time one cell of the table for every engine. Also say why engines died, if some did.

    Args:
        expert_bytes: bytes of an expert's weights and scales.
        budget: seconds of timed calls for each engine.
    """
    died: dict[str, str] = {}
    runs: list[_Times] = []
    for name, peer in peers.items():
        try:
            runs.append(_Times(name, peer, *peer.batches(tokens)))
        except Died as words:
            died[name] = str(words)
    touched = [len(set(routing(shape, tokens, s)[0].flatten().tolist())) for s in seeds(tokens)]
    operations = shape.operations(tokens)
    matrix = [probes.matrix_rate() for _ in range(3)]
    read = probes.read_rate()
    rounds = 0
    while rounds < MAX_ROUNDS and (
        rounds < MIN_ROUNDS or any(sum(run.seconds) < budget for run in runs)
    ):
        for run in list(runs):
            try:
                took = run.peer.time(rounds, run.calls())
            except Died as words:
                died[run.name] = str(words)
                runs.remove(run)
                continue
            before, read = read, probes.read_rate()
            rates.read.append(read)
            for i, seconds in enumerate(took):
                size = touched[(rounds + i) % len(touched)] * expert_bytes
                limit = max(2 * size / (before + read), operations / statistics.median(matrix))
                run.seconds.append(seconds)
                run.fractions.append(limit / seconds)
                run.rates.append(size / seconds)
        rounds += 1
        if rounds % 5 == 0:
            matrix.append(probes.matrix_rate())
    rates.matrix += matrix
    results = []
    for run in runs:
        middle = statistics.median(run.seconds)
        results.append(
            Result(
                shape=str(shape),
                format=format,
                engine=run.name,
                tokens=tokens,
                threads=threads,
                ms=middle * 1e3,
                gb_s=statistics.median(run.rates) / 1e9,
                gflop_s=operations / middle / 1e9,
                roofline=statistics.median(run.fractions),
                error=run.error,
            )
        )
    return results, died
