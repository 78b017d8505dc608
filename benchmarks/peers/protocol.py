"""An engine in a process of its own, stopped except while it is asked something.

Requests and answers are lines of JSON on stdin and stdout. A stopped process (SIGSTOP) keeps its
memory and its warm state, and its spinning threads take no core from the engine being timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cases import Shape
from benchmarks.peers.settings import Refused, Settings

ROOT = Path(__file__).parents[2]


class Died(Exception):
    """What a process said last."""


class Peer:
    """One engine. Use as a context manager, which ends the process."""

    def __init__(self, module: str, python: str, settings: Settings) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(settings.threads),
            # PyTorch asks for huge pages, as lk does.
            "THP_MEM_ALLOC_ENABLE": "1",
        }
        # That is for the caller's probes; an engine sets what is best for it.
        environment.pop("OMP_WAIT_POLICY", None)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        command = [python, "-m", "benchmarks.peers.serve", module, json.dumps(asdict(settings))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )
        # Not stopped before its first answer: by then it has asked to die with this process.
        self.pid = self._process.pid

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # reaches a stopped process, too
        self._process.communicate()
        self._errors.close()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        # Returns when every thread has stopped. The state is left for Popen to collect.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _ask(self, do: str, **arguments: Any) -> Any:
        """Raises Died if the process ended, Refused with the engine's reason."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Died(self._last_words())
        self._stop()
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["result"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return f"{how}: {lines[-1]}" if lines else how

    def introduce(self) -> tuple[str, list[str]]:
        """The engine's version and formats; Refused if its package is not installed."""
        version, formats = self._ask("introduce")
        return version, formats

    def release(self) -> None:
        """Frees the layers."""
        self._ask("release")

    def prepare(self, shape: Shape, format: str, layers: int, seed: int) -> None:
        """Makes layers of random weights, in place of those of before."""
        self._ask("prepare", shape=str(shape), format=format, layers=layers, seed=seed)

    def batches(self, tokens: int) -> tuple[float, float]:
        """Makes the batches of that size; the error of the first one, and seconds of a call."""
        error, seconds = self._ask("batches", tokens=tokens)
        return error, seconds

    def time(self, first: int, calls: int) -> list[float]:
        """Seconds of the calls number first, first + 1, ...: each the next layer and batch."""
        return list(self._ask("time", first=first, calls=calls))
