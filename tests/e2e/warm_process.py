"""Processes of vLLM that are forked from one that has imported it.

Importing vLLM takes 13 s of CPU time, and each of the eight garbage collections of an engine's
start then takes 0.6 s, because it looks at all that was imported. The tests start some 150 engines.
So one process for all of them imports vLLM, exempts that from garbage collection and starts no
thread; it forks a process for each call of `fork`. An engine then starts in 1.5 s instead of 20.
"""

import atexit
import functools
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import setproctitle
import torch
from prometheus_client import values

ROOT = Path(__file__).parents[2]
# What processes of vLLM import in any case, or with LvLLM's plugin, before they know the model.
MODULES = (
    "vllm.distributed.device_communicators.cpu_communicator",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.auto_awq",
    "vllm.model_executor.layers.quantization.auto_gptq",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.inc",
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.model_executor.models.gpt_oss",
    "vllm.model_executor.models.transformers",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
)


Before = Callable[[], object]

_before: Before | None = None


@contextmanager
def beginning_with(before: Before) -> Iterator[None]:
    """Processes that are forked in this block first call `before`, which can be pickled.

    What it does, such as setting a limit, holds for their workers, too.
    """
    global _before
    _before = before
    try:
        yield
    finally:
        _before = None


class Forked:
    """A forked process, with what the tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._receive(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended. Raises subprocess.TimeoutExpired."""
        code = self._receive(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and all that it started, which are in a session of their own."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def _receive(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.recv(16))
            self._status.close()
        return self.returncode


def fork(
    function: Callable[..., None],
    *arguments: Any,
    environment: dict[str, str],
    stdout: IO[Any],
    stderr: IO[Any] | None = None,
    stdin: IO[Any] | None = None,
) -> Forked:
    """Call `function`, which can be pickled, in a forked process with these variables alone.

    The process is the first one of a new session. `stderr` is `stdout` by default, and `stdin` is
    empty.
    """
    call = pickle.dumps((environment, _before, pickle.dumps((function, arguments))))
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, open(os.devnull) as empty:
        standard = (stdin or empty, stdout, stderr or stdout)
        files = [theirs.fileno(), *(file.fileno() for file in standard)]
        warm, connection = _warm_process()
        with suppress(BrokenPipeError):
            socket.send_fds(connection, [call], files)
    pid = status.recv(16)
    if not pid:
        raise RuntimeError(f"the process that imports vLLM has ended: exit code {warm.wait()}")
    return Forked(int(pid), status)


@functools.cache
def _warm_process() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process that imports vLLM, and the connection to it, with whose end it ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.warm_process", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return process, ours


def _import_vllm() -> None:
    for module in MODULES:
        importlib.import_module(module)
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    # Each of these takes 0.5 to 2 s, in each process that does not find it done.
    configure_logging_if_needed(LoggingConfig())
    CpuPlatform.register_triton_kernel_overrides()  # searches all modules for the kernels
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
    gc.collect()
    gc.freeze()
    # To ask about a class of model, vLLM starts a process, lest the question initialise CUDA.
    registry._run_in_subprocess = lambda ask: ask()


def _serve(control: socket.socket) -> bytes:
    """Fork a process for each request. Returns in those processes, with what they are to call."""
    running: dict[int, socket.socket] = {}
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as status, suppress(BrokenPipeError):
                status.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
        if not select.select([control], [], [], 0.05 if running else None)[0]:
            continue
        call, files, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not call:  # the connection is closed
            raise SystemExit
        status_file, *standard = files
        if pid := os.fork():
            running[pid] = socket.socket(fileno=status_file)
            running[pid].send(str(pid).encode())
            for file in standard:
                os.close(file)
            continue
        os.setsid()
        for number, file in enumerate(standard):
            os.dup2(file, number)
            os.close(file)
        os.close(status_file)
        control.close()
        for status in running.values():
            status.close()
        return call


class Worker(ForkServerProcess):
    """One of vLLM's other processes, forked and with the environment that its parent has then."""

    def __reduce__(self) -> Any:
        return _worker, (dict(os.environ),), self.__dict__


def _worker(environment: dict[str, str]) -> Worker:
    """In the forked process: the process object, before its target and arguments are unpickled."""
    _set_environment(environment)
    return Worker.__new__(Worker)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # It is looked up once in a process.
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # These libraries have read their variables while they were imported.
    values.ValueClass = values.get_value_class()
    torch._dynamo.config.disable = environment.get("TORCHDYNAMO_DISABLE") == "1"
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _fork_workers() -> None:
    """Let vLLM's other processes be forked from a copy of this one, which has no threads yet."""
    if sys.version_info >= (3, 14):
        return  # whose fork server wants a key: the others import vLLM themselves
    from vllm.v1 import utils as api_servers
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    class Context(ForkServerContext):
        Process = Worker  # type: ignore[assignment]

    context = Context()
    for module in (coordinator, utils, multiproc_executor):
        module.get_mp_context = lambda: context
    api_servers.multiprocessing = SimpleNamespace(get_context=lambda method: context)  # type: ignore[assignment]
    # This does what multiprocessing does, with a fork in the place of a new Python.
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = resource_tracker.ensure_running
    server._forkserver_address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    end, alive = os.pipe()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(server._forkserver_address)
    listener.listen()
    if os.fork():
        os.close(end)
        listener.close()
        server._forkserver_alive_fd = alive
        return
    os.close(alive)
    with suppress(SystemExit):
        forkserver.main(listener.detach(), end, [])  # until all other processes have ended
    os._exit(0)


def main() -> None:
    """The process that imports vLLM, and the processes that it forks."""
    setproctitle.getproctitle()  # It looks for its place while the environment is still there.
    _import_vllm()
    environment, before, call = pickle.loads(_serve(socket.socket(fileno=int(sys.argv[1]))))
    _set_environment(environment)
    if before is not None:
        before()
    _fork_workers()
    atexit.register(gc.unfreeze)  # or a library reports what is frozen as leaked
    function, arguments = pickle.loads(call)
    function(*arguments)
    sys.stdout.flush()
    atexit._run_exitfuncs()
    os._exit(0)  # to tear down all modules takes 1 s


if __name__ == "__main__":
    main()
