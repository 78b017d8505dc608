"""How long a killed server takes until it answers again, with and without a bank.

    python -m benchmarks.restart [--gib 8.5] [--folder DIR]

This makes a Qwen3-MoE checkpoint of the given size with random weights. A server answers a prompt,
is killed with SIGKILL while it computes other requests, and is started again at once. The time runs
from the kill to the first answer with the same tokens as before, which is asked for ten times a
second. The experts come from a bank, from files in the page cache, or from files on disk. The
benchmark needs the size on disk, and the size plus 3 GiB of memory.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx

from benchmarks.loading import cat, make
from lvllm.checkpoint.headers import Checkpoint
from lvllm.serving.background import free_port
from lvllm.units import GIB

BANK = "import sys; from lvllm.cli import main; sys.argv.insert(1, 'bank'); main()"
TOKENIZER = Path(__file__).parents[1] / "examples/models/tiny-moe"
KV_CACHE = 128 << 20
TOKENS = 8
CLIENT = httpx.Client(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None))


class Server:
    """`vllm serve`, which ends with the block."""

    def __init__(self, folder: Path, log: Path, share: bool) -> None:
        port = str(free_port())
        options = {"max-model-len": 1024, "kv-cache-memory-bytes": KV_CACHE, "port": port}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
        switches = ["--host", "127.0.0.1", "--enforce-eager", "--served-model-name", "model"]
        environment = {"LVLLM_MOE_NUMA_ENABLED": "1", "LVLLM_SHARE_EXPERTS": str(int(share))}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *words, *switches],
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ask(self, prompt: list[int], tokens: int = TOKENS) -> list[int]:
        """Greedy tokens. Raises httpx.HTTPError."""
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
        asked |= {"model": "model", "ignore_eos": True, "return_token_ids": True}
        answer = CLIENT.post(f"{self.url}/v1/completions", json=asked)
        answer.raise_for_status()
        return list(answer.json()["choices"][0]["token_ids"])

    def first_answer(self, prompt: list[int]) -> list[int]:
        """The answer, as soon as there is one."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text(errors="replace")[-4000:])
            with suppress(httpx.TransportError):  # Nobody listens yet.
                return self.ask(prompt)
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def bank(folder: Path, log: Path) -> Iterator[float]:
    """A bank of the model. Yields the seconds that it took to be ready."""
    start = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", BANK, str(folder), "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        states = (json.loads(line)["state"] for line in process.stdout)
        if "ready" not in states:
            raise SystemExit(log.read_text(errors="replace")[-4000:])
        yield time.monotonic() - start
    finally:
        process.terminate()
        process.wait()


class Restarts:
    """Servers of one model, each of which takes the place of one that is killed while it computes.

    Use as a context manager, which ends the last one.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        self._prompt = [random.randrange(3, 500) for _ in range(16)]
        self._server = Server(folder, log, share=True)

    def __enter__(self) -> Self:
        self._expected = self._server.first_answer(self._prompt)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()

    def next(self, share: bool, cold: tuple[Path, ...] = ()) -> float:
        """Seconds from the kill of a server to the first right answer of the next one.

        The files that are `cold` are dropped from the page cache after the kill.
        """
        for _ in range(4):
            threading.Thread(target=_load, args=(self._server,), daemon=True).start()
        time.sleep(2)
        start = time.monotonic()
        self._server.kill()
        for file in cold:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._server = Server(self._folder, self._log, share)
        answer = self._server.first_answer(self._prompt)
        seconds = time.monotonic() - start
        if answer != self._expected:
            raise SystemExit(f"{answer} after the restart, {self._expected} before")
        return seconds


def _load(server: Server) -> None:
    with suppress(httpx.HTTPError):
        server.ask([random.randrange(3, 500) for _ in range(32)], 900)


def measure(folder: Path) -> None:
    """Print the times of the model in `folder`, which has tokenizer files."""
    checkpoint = Checkpoint.open(folder)
    log, bank_log = folder / "server.log", folder / "bank.log"

    def show(label: str, seconds: float) -> None:
        print(f"{label:24}{seconds:6.1f} s, load average {os.getloadavg()[0]:.1f}", flush=True)

    cat(checkpoint.files)
    print(f"{checkpoint.nbytes / GIB:.2f} GiB", flush=True)
    with ExitStack() as stack:
        with bank(folder, bank_log) as seconds:
            show("loading into the bank", seconds)
            servers = stack.enter_context(Restarts(folder, log))
            show("experts in a bank", servers.next(share=True))
        # The bank has ended, and the last server goes on.
        show("files in the page cache", servers.next(share=False))
        show("files on disk", servers.next(share=False, cold=checkpoint.files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.5)
    parser.add_argument("--folder", type=Path, help="where to make it; default the system's")
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder} is no folder")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make(folder, int(arguments.gib * GIB), 4 * GIB)
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder)
        measure(folder)


if __name__ == "__main__":
    main()
