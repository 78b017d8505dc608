"""`vllm serve`: with settings that it must refuse, and with processes that are to end."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

import openai

from lvllm.serving.background import free_port
from tests.e2e.warm_process import ROOT, Forked, fork

VLLM = str(Path(sys.executable).with_name("vllm"))
SHARED_MEMORY = Path("/dev/shm")
# Starting takes 25 s alone on two cores, and compiling a model more; beside others it may take many
# times that. This only ends what hangs.
START_SECONDS = 600
END_SECONDS = 60


def serve(*arguments: str) -> None:
    """In a forked process: what the command `vllm serve` does."""
    from vllm.entrypoints.cli.main import main

    sys.argv = [VLLM, "serve", *arguments]
    main()


def fail_to_serve(*arguments: str, command: bool = False, **environment: str) -> tuple[int, str]:
    """Run a server that must not start, by the real `command` or in a fork of the warm process.

    Returns its exit code and its standard error.
    """
    variables = os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | environment
    with open(os.devnull, "w") as nothing, tempfile.TemporaryFile("w+") as errors:
        process: subprocess.Popen[bytes] | Forked
        if command:
            process = subprocess.Popen(
                [VLLM, "serve", *arguments], cwd=ROOT, env=variables, stdout=nothing, stderr=errors
            )
        else:
            process = fork(serve, *arguments, environment=variables, stdout=nothing, stderr=errors)
        try:
            code = process.wait(START_SECONDS)
        finally:
            process.kill()
        errors.seek(0)
        return code, errors.read()


def title(process: int) -> str:
    """What `ps` shows of a process; nothing once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


class Server:
    """A server in a session of its own, whose processes are killed when the block ends.

    Args:
        log: the file for what its processes say.
        arguments: of `vllm serve`.
        environment: variables beside those of this process.
    """

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        self.process, self.url = self.start(log, *arguments, **environment)

    @staticmethod
    def start(
        log: Path, *arguments: str, **environment: str
    ) -> tuple[subprocess.Popen[bytes] | Forked, str]:
        """Fork a server from the warm process. Returns it and its future base URL."""
        port = str(free_port())
        local = ("--host", "127.0.0.1", "--port", port)
        variables = os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | environment
        with log.open("wb") as output:
            process = fork(serve, *arguments, *local, environment=variables, stdout=output)
        return process, f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def ready(self) -> Self:
        """Once it answers."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.process.poll() is None, self.said()
            with suppress(OSError), urlopen(f"{self.url}/health", timeout=2):
                return self
            time.sleep(0.3)
        raise AssertionError(self.said())

    def ask(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers, all asked for at once. Raises openai.APIError."""
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=END_SECONDS
        )
        model = client.models.list().data[0].id

        def one(prompt: list[int]) -> list[int]:
            asked: Any = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            more = {"ignore_eos": True, "return_token_ids": True}
            answer: Any = client.completions.create(**asked, extra_body=more)
            return list(answer.choices[0].token_ids)

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts))

    def metric(self, name: str) -> dict[str, float]:
        """A counter's value by its labels."""
        with urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.rpartition(" ") for line in lines if re.match(rf"{name}[{{ ]", line)]
        return {labels: float(value) for labels, _, value in found}

    def processes(self) -> list[int]:
        """All that are still there."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = file.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(file.parent.name))
        return sorted(found)

    def segments(self) -> list[Path]:
        """Names in /dev/shm of memory that its processes have mapped."""
        found = set()
        for process in self.processes():
            with suppress(OSError):
                maps = Path(f"/proc/{process}/maps").read_text()
                found.update(re.findall(rf"{SHARED_MEMORY}/\S+$", maps, re.MULTILINE))
        return [Path(name) for name in sorted(found) if Path(name).exists()]

    def ended(self, seconds: float = END_SECONDS) -> None:
        """Once all processes are gone; AssertionError if one is not."""
        until = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        while self.processes():
            assert time.monotonic() < until, (self.processes(), self.said())
            time.sleep(0.1)

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-6000:]


class CommandServer(Server):
    """A server by the real command."""

    @staticmethod
    def start(
        log: Path, *arguments: str, **environment: str
    ) -> tuple[subprocess.Popen[bytes] | Forked, str]:
        """Start it. Returns its process and its future base URL."""
        port = str(free_port())
        with log.open("wb") as output:
            process = subprocess.Popen(
                [VLLM, "serve", *arguments, "--host", "127.0.0.1", "--port", port],
                cwd=ROOT,
                env=os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return process, f"http://127.0.0.1:{port}"
