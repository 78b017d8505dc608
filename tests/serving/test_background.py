"""Servers that run beside a chat, and end with it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvllm.serving import background
from lvllm.serving.background import ServerError, free_port, running
from lvllm.serving.launch import Launch

SERVER = """
import http.server, signal, subprocess, sys
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
CALLER = """
import sys
from pathlib import Path
from lvllm.serving.background import running
from lvllm.serving.launch import Launch
with running(Launch(sys.argv[3:], {}, []), sys.argv[1], Path(sys.argv[2]), print):
    print("serving", flush=True)
    import time; time.sleep(600)
"""


def launch(port: int, stubborn: bool = False) -> Launch:
    code = SERVER.format(port=port, stubborn=stubborn)
    return Launch([sys.executable, "-c", code], dict(os.environ), [])


def child_of(log: Path) -> int:
    return int(log.read_text().split("child ")[1].split()[0])


def ends(pid: int, seconds: float = 120) -> bool:
    """Whether a process is gone, or a zombie that nobody waits for, before so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:  # The file is gone, or the process while it is read.
            return True
        time.sleep(0.05)
    return False


def test_a_free_port_is_one_that_the_kernel_gives_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the server listens there, others get ports from the kernel."""
    range_of_ports = tmp_path / "range"
    monkeypatch.setattr(background, "KERNELS_PORTS", range_of_ports)
    range_of_ports.write_text("20500\t60999\n")
    assert all(20000 <= free_port() < 20500 for _ in range(200))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(background, "FIRST_PORT", taken)
        range_of_ports.write_text(f"{taken + 1} 65535")
        assert free_port() not in (0, taken)
    for unknown in ("1024 65535", ""):
        range_of_ports.write_text(unknown)
        assert free_port() > 0


def test_a_server_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with running(launch(port), f"http://127.0.0.1:{port}", log, lambda line: None):
        child = child_of(log)
        assert not ends(child, 0.2)
    assert ends(child)


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_it_ends_when_the_chat_is_killed(signal: str, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = launch(port).command
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, f"http://127.0.0.1:{port}", str(log), *command],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert caller.stdout is not None
    assert any("serving" in line for line in caller.stdout)
    caller.send_signal(getattr(__import__("signal"), f"SIG{signal}"))
    caller.wait()
    caller.stdout.close()
    assert ends(child_of(log))


def test_a_server_ends_with_a_killed_guardian() -> None:
    from lvllm.serving import guardian

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, guardian.__file__, str(reading), sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(reading,),
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        process.kill()
        assert ends(server)
    os.close(reading)
    os.close(writing)


def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvllm.serving import guardian

    short = tmp_path / "guardian.py"
    text = Path(guardian.__file__).read_text()
    assert "STOP_SECONDS = 20" in text
    short.write_text(text.replace("STOP_SECONDS = 20", "STOP_SECONDS = 0.5"))
    monkeypatch.setattr(guardian, "__file__", str(short))
    port, log = free_port(), tmp_path / "log"
    with running(launch(port, stubborn=True), f"http://127.0.0.1:{port}", log, lambda line: None):
        child = child_of(log)
    assert ends(child)


def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "print('a'); print('lvllm: LK_THREADS=7 is not allowed'); print('b'); raise SystemExit(3)"
    )
    failing = Launch([sys.executable, "-c", code], dict(os.environ), [])
    with (
        pytest.raises(ServerError, match=r"^LK_THREADS=7 is not allowed$"),
        running(failing, "http://127.0.0.1:1", log, lambda line: None),
    ):
        pass
    code = "raise SystemExit('unknown reason')"
    failing = Launch([sys.executable, "-c", code], dict(os.environ), [])
    with (
        pytest.raises(ServerError, match=r"ended with code 1; the end of .*:\nunknown reason"),
        running(failing, "http://127.0.0.1:1", log, lambda line: None),
    ):
        pass
