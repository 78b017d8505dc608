"""Whether a server keeps its memory, files and threads through many requests, and sleeps between.

    python -m tests.e2e.soak [--requests 10000] [--idle-seconds 60]

This takes an hour, so no test does it. It serves the demo model, asks questions in crowds of 200
of whom half leave, sends wrong requests and half ones between them, and prints after each tenth of
the requests what all processes of the server have. It exits with code 1 if the numbers after the
first fifth and at the end differ by more than `GROWTH` allows, or if the idle server takes 2% of a
core or more.
"""

import asyncio
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from tests.e2e import hostile
from tests.e2e.server import Server
from tests.e2e.test_hostile_requests import ARGUMENTS, LONGEST, MODEL, SETTINGS, VOCABULARY

CROWD = 200
PATIENCE = 600
"""Seconds that an answer may take; within an hour, the machine may be busy with something else."""
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Held:
    """What all processes of a server have together."""

    pss_mib: int
    """Memory; of pages that several processes share, each has its part."""
    files: int
    threads: int


GROWTH = Held(pss_mib=40, files=2, threads=2)
"""The most that may come. The API server's allocator keeps what a crowd has needed."""


def held(server: Server) -> Held:
    kib = files = threads = 0
    for process in server.processes():
        folder = Path(f"/proc/{process}")
        found = re.search(r"\nPss:\s+(\d+)", (folder / "smaps_rollup").read_text())
        assert found is not None
        kib += int(found[1])
        files += len(list((folder / "fd").iterdir()))
        threads += len(list((folder / "task").iterdir()))
    return Held(kib >> 10, files, threads)


def cpu_seconds(server: Server) -> float:
    """Of all processes since their start."""
    ticks = 0
    for process in server.processes():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def round_of_requests(server: Server, client: httpx.Client, asked: list[hostile.Question]) -> int:
    """A crowd, clients that break off, and wrong requests. Returns the number of requests."""
    stayed = asyncio.run(hostile.crowd(server, MODEL, random.choices(asked, k=CROWD), CROWD))
    assert stayed > 0
    for silent in hostile.disturb(server, MODEL):
        silent.close()
    bodies = hostile.refused(MODEL, VOCABULARY, LONGEST)
    for body in bodies.values():
        answer = client.post("/v1/completions", content=body, headers=HEADERS)
        assert 400 <= answer.status_code < 500, answer.text
    hostile.settle(server)
    for one in asked[:3]:
        assert hostile.answer(client, MODEL, one.prompt, len(one.answer)) == one.answer
    return CROWD + len(bodies) + 3


def main(
    requests: Annotated[int, typer.Option(min=1000)] = 10_000,
    idle_seconds: Annotated[int, typer.Option(min=5)] = 60,
) -> None:
    """Ask so many requests, and then watch the idle server."""
    log = Path(tempfile.mkdtemp(prefix="lvllm-soak-")) / "log"
    print(f"log: {log}", flush=True)
    with (
        Server(log, *ARGUMENTS, **SETTINGS).ready() as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        asked = hostile.questions(client, MODEL, VOCABULARY, 8, 24)
        done = 0
        seen: list[Held] = []
        while done < requests:
            done += round_of_requests(server, client, asked)
            if done * 10 // requests > len(seen):
                seen.append(held(server))
                print(f"{done} requests: {seen[-1]}", flush=True)
        time.sleep(5)  # A worker spins for a second after its last step, for the next one.
        began, before = time.monotonic(), cpu_seconds(server)
        time.sleep(idle_seconds)
        share = (cpu_seconds(server) - before) / (time.monotonic() - began)
        print(f"the idle server takes {share:.2%} of a core", flush=True)
    first, last = seen[1 if len(seen) > 2 else 0], seen[-1]
    grown = [
        after - before > most
        for before, after, most in zip(astuple(first), astuple(last), astuple(GROWTH), strict=True)
    ]
    sys.exit(1 if any(grown) or share >= 0.02 else 0)


if __name__ == "__main__":
    typer.run(main)
