"""Every process of a server, killed by every signal, at random moments.

    python -m tests.e2e.kill_matrix [--minutes 60] [--only tensor] [--command] [--seed N]

No test does all of this: tests/e2e/test_kills.py has a few cells. A cell is a way of serving, a
process, a signal, and what the server does then: it loads the model, is idle or answers. Cells are
drawn at random until the time is over. A cell fails unless

- all processes end soon after the signal, nothing is left in /dev/shm or in the folder for
  temporary files, and the exit code says that something went wrong, or
- the server goes on with right answers and, but for a prefill engine, with all processes.

A process that is stopped (SIGSTOP) goes on again later and the server has to be as before, or the
front process is killed meanwhile and the stopped process has to end with it. Every server has to
give right answers before it is harmed, so each is the restart after the cell before it.

The servers are forked from a process that has imported vLLM. With --command they are real commands,
which take 30 s of CPU time each.
"""

import itertools
import os
import random
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import openai
import typer

from lvllm.errors import LvllmError
from lvllm.evaluation import ask_server, load_questions, score
from tests.e2e.generate import TINY
from tests.e2e.mounts import mount_for_itself
from tests.e2e.server import CommandServer, Server, title

SHARED_MEMORY = Path("/dev/shm")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
MOMENTS = ("loading", "idle", "answering")
SERVES = (str(TINY), "--max-model-len", "512", "--enforce-eager", "--served-model-name", "tiny")
ASKED = load_questions()[:4]
GONE_SECONDS = 5
"""How soon all processes are to be gone; the others are counted as slow."""


@dataclass(frozen=True)
class Kind:
    """A way of serving."""

    processes: tuple[str, ...]
    """How the names of its processes begin behind `VLLM::`, besides the front process."""
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    """Processes without which the server goes on."""


ENGINE = ("EngineCore", "Worker")
KINDS = {
    "single": Kind(ENGINE),
    "tensor": Kind(ENGINE, ("--tensor-parallel-size", "2")),
    "shared": Kind(ENGINE, variables={"LVLLM_SHARE_EXPERTS": "1"}),
    "data": Kind((*ENGINE, "ApiServer", "DPCoordinator"), ("--data-parallel-size", "2")),
    "data with one front": Kind(
        (*ENGINE, "DPCoordinator"), ("--data-parallel-size", "2", "--api-server-count", "1")
    ),
    "prefill": Kind(
        ("EngineCore",), variables={"LVLLM_PREFILL_ENGINE": "16"}, spare=("EngineCore",)
    ),
    "stand-in of a GPU": Kind(ENGINE, variables={"LVLLM_ACCELERATOR": "host"}),
}


@dataclass(frozen=True)
class Cell:
    kind: str
    process: str
    signal: signal.Signals
    moment: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.signal.name} to {self.process} while {self.moment}"


class Wrong(Exception):
    """What a cell must not do."""


def all_cells(kind: str) -> list[Cell]:
    processes = ("front", *KINDS[kind].processes)
    return [Cell(kind, *rest) for rest in itertools.product(processes, SIGNALS, MOMENTS)]


def own_shared_memory() -> bool:
    """Give this process and its children a /dev/shm of their own; False: it may not."""
    try:
        mount_for_itself(SHARED_MEMORY, "4g")
    except OSError:
        return False
    return True


class Matrix:
    """Runs cells one after the other, and keeps a server that a cell has not harmed."""

    def __init__(self, command: bool, patience: int) -> None:
        self.command = command
        self.patience = patience
        self.alone = own_shared_memory()
        self.folder = Path(tempfile.mkdtemp(prefix="lvllm-kills-", dir="/tmp"))
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.server: Server | None = None
        self.kind = ""
        self.abandoned = 0
        """Folders that servers before this one had left when it began, for it to remove."""
        self.said = ""
        """What the last server that was ended had said."""

    def run(self, cell: Cell) -> None:
        """Raises Wrong, or AssertionError of a server that does not start."""
        self.said = ""
        if cell.moment == "loading" or self.kind != cell.kind:
            self.end()
        if self.server is None:
            self.start(cell.kind)
        assert self.server is not None
        if cell.moment == "loading":
            victim = self._appears(cell)
            time.sleep(random.uniform(0, 3))
        else:
            self.server.ready()
            self.check()
            victim = self._victim(cell)
        with self._asked(cell.moment == "answering"):
            before = self.server.processes()
            if victim not in before:
                raise Wrong("the process has ended by itself")
            self._harm(cell, victim, before)

    def start(self, kind: str) -> None:
        made = CommandServer if self.command else Server
        variables = {
            "TMPDIR": str(self.folder),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "LK_THREADS": "1",
            **KINDS[kind].variables,
        }
        log = self.folder / "log"
        self.abandoned = len(self._folders())
        self.server, self.kind = made(log, *SERVES, *KINDS[kind].arguments, **variables), kind

    def end(self) -> None:
        """Kill what is left of a server."""
        if self.server is not None:
            self.said = self.server.said()
            self.server.__exit__(None, None, None)
            self._leave_nothing()
        self.server, self.kind = None, ""

    def _leave_nothing(self) -> None:
        """Remove what stays of processes that were killed together with their resource tracker."""
        for name in os.listdir(SHARED_MEMORY) if self.alone else ():
            (SHARED_MEMORY / name).unlink()

    def check(self) -> None:
        """The answers of the server are right."""
        assert self.server is not None
        found = score(ASKED, ask_server(ASKED, f"{self.server.url}/v1"))
        if found.accuracy != 1:
            raise Wrong(f"answers are wrong: {found}")

    def _victims(self, cell: Cell) -> list[int]:
        assert self.server is not None
        if cell.process == "front":
            return [self.server.process.pid]
        front = self.server.process.pid
        return [
            pid
            for pid in self.server.processes()
            if pid != front and title(pid).startswith("VLLM::") and cell.process in title(pid)
        ]

    def _victim(self, cell: Cell) -> int:
        found = self._victims(cell)
        if not found:
            assert self.server is not None
            raise Wrong(f"no such process: {[title(pid) for pid in self.server.processes()]}")
        return random.choice(found)

    def _appears(self, cell: Cell) -> int:
        """The process, once it is there."""
        assert self.server is not None
        while not (found := self._victims(cell)):
            if self.server.process.poll() is not None:
                raise Wrong("the server has ended by itself")
            time.sleep(0.05)
        return random.choice(found)

    @contextmanager
    def _asked(self, really: bool) -> Iterator[None]:
        """While clients wait for long answers, which they may not get."""
        if not really:
            yield
            return
        assert self.server is not None

        def ask(prompt: list[int]) -> None:
            assert self.server is not None
            with suppress(openai.APIError):
                self.server.ask([prompt], 400)

        with ThreadPoolExecutor(4) as pool:
            prompts = [[random.randrange(3, 60) for _ in range(n)] for n in (5, 40, 80, 9)]
            waiting = [pool.submit(ask, prompt) for prompt in prompts]
            time.sleep(random.uniform(0.1, 1.5))
            yield
            for one in waiting:
                one.result()

    def _harm(self, cell: Cell, victim: int, before: list[int]) -> None:
        assert self.server is not None
        sent = time.monotonic()
        number, front = cell.signal, self.server.process.pid
        os.kill(victim, number)
        killed = victim == front and number in (signal.SIGKILL, signal.SIGSEGV)
        if number == signal.SIGSTOP:
            time.sleep(random.uniform(0, 3))
            # A forked server's processes are not children of each other, which this relies on.
            if cell.process != "front" and not (self.command and random.random() < 0.5):
                os.kill(victim, signal.SIGCONT)
                self._goes_on(cell, before)
                return
            sent, killed = time.monotonic(), True
            os.kill(front, signal.SIGKILL)
        may_go_on = victim != front and number in (signal.SIGTERM, signal.SIGINT)
        while self.server.processes() and time.monotonic() < sent + self.patience:
            waited = time.monotonic() - sent
            if may_go_on and waited > 2 * GONE_SECONDS and self.server.processes() == before:
                break
            time.sleep(0.02)
        if self.server.processes():
            self._goes_on(cell, before)
            return
        took = time.monotonic() - sent
        self.slowest = max(self.slowest, took)
        self.counts["ended" if took <= GONE_SECONDS else "ended slowly"] += 1
        code = self.server.process.wait()
        asked = victim == front and number in (signal.SIGTERM, signal.SIGINT)
        if code == 0 and not asked:
            raise Wrong("exit code 0")
        left = [
            path.name
            for path in self.folder.iterdir()
            if path.name.startswith("vllm_dist_") or stat.S_ISSOCK(path.stat().st_mode)
        ]
        folders = len(self._folders())
        # A server that is stopped while it loads may not have come to remove those of others.
        if left or folders > killed + (self.abandoned if cell.moment == "loading" else 0):
            raise Wrong(f"left in the folder for temporary files: {left}, {folders} folders")
        if self.alone and (left := os.listdir(SHARED_MEMORY)):
            raise Wrong(f"left in /dev/shm: {left}")
        self.end()

    def _folders(self) -> list[Path]:
        return [*self.folder.glob("lvllm-server-*")]

    def _goes_on(self, cell: Cell, before: list[int]) -> None:
        assert self.server is not None
        harmless = cell.signal in (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
        if cell.process == "front" and cell.signal != signal.SIGSTOP:
            raise Wrong(f"left: {[title(pid) for pid in self.server.processes()]}")
        if not harmless and cell.process not in KINDS[cell.kind].spare:
            raise Wrong(f"left: {[title(pid) for pid in self.server.processes()]}")
        self.server.ready()
        self.check()
        gone = {pid for pid in before if pid not in self.server.processes()}
        if gone and cell.process not in KINDS[cell.kind].spare and cell.moment != "loading":
            raise Wrong("a process has ended, and the server goes on")
        self.counts["goes on"] += 1
        if gone or cell.moment == "loading":
            self.end()


def main(
    minutes: Annotated[float, typer.Option(min=0)] = 60,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Such servers alone: {', '.join(KINDS)}.")
    ] = None,
    command: Annotated[bool, typer.Option(help="Start real commands.")] = False,
    patience: Annotated[int, typer.Option(help="Seconds after which processes hang.")] = 30,
    seed: int | None = None,
) -> None:
    """Kill until the time is over."""
    if unknown := [kind for kind in only or () if kind not in KINDS]:
        raise typer.BadParameter(f"--only {unknown[0]}: allowed are {', '.join(KINDS)}")
    seed = random.randrange(1 << 30) if seed is None else seed
    random.seed(seed)
    cells: list[Cell] = []
    # Cells of a kind follow each other, for they may share a server.
    for kind in random.sample(only or list(KINDS), len(only or KINDS)):
        own = all_cells(kind)
        cells += random.sample(own, len(own))
    print(f"seed {seed}: {len(cells)} cells", flush=True)
    matrix, until = Matrix(command, patience), time.monotonic() + minutes * 60
    wrong = []
    done = 0
    try:
        for cell in itertools.cycle(cells):
            if time.monotonic() > until:
                break
            try:
                matrix.run(cell)
            except (Wrong, AssertionError, LvllmError, openai.APIError, OSError) as error:
                matrix.end()
                wrong.append(cell)
                kept = matrix.folder / f"log-of-{done}"
                kept.write_text(matrix.said)
                print(f"WRONG {cell}: {str(error)[:500]} (log: {kept})", flush=True)
            done += 1
            print(f"{done} {cell}: {dict(matrix.counts)}, {matrix.slowest:.1f} s", flush=True)
    finally:
        matrix.end()
    print(f"{done} cells, {len(wrong)} wrong: {dict(matrix.counts)}")
    print(f"the slowest were gone after {matrix.slowest:.1f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
