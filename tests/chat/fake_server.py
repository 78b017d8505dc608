"""A small OpenAI-compatible server in a thread, which answers as a test tells it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT = 120.0
"""How many seconds the server waits for what a test must do; nothing waits that long if all works.
"""


@dataclass
class Answer:
    """What the server says to one question."""

    deltas: list[dict[str, str] | str] = field(default_factory=list)
    """Deltas in their order; a string is a delta with this content."""
    tokens: int | None = 5
    """`completion_tokens` of the usage; None for a server that sends no usage."""
    finish_reason: str = "stop"
    ends: str = "properly"
    """`properly`; `dead` closes the connection after the deltas; `early` ends the body there;
    `endless` repeats the last delta until the client goes away; `silent` waits for that; `error`
    sends an error as an event."""
    status: int = 200
    body: Any = None
    """With another status, what the server sends as JSON."""
    pause: float = 0.0
    """Seconds before each delta."""


class FakeServer(ThreadingHTTPServer):
    """Gives its `answers` one after the other, and keeps the requests."""

    daemon_threads = True

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = {"data": [{"id": "first"}, {"id": "second"}]}
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def messages(self) -> list[tuple[str, str]]:
        """Role and content of the last request's messages."""
        return [(said["role"], said["content"]) for said in self.requests[-1]["messages"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test prints what it wants to see."""

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        if self.path == "/v1/models":
            self._send(200, self.server.models)
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.headers.append(dict(self.headers))
        self.server.requests.append(json.loads(body))
        answer = self.server.answers.pop(0)
        if answer.status != 200:
            self._send(answer.status, answer.body)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(answer)
        except OSError:
            self.server.client_left.set()
        self.close_connection = True

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, answer: Answer) -> None:
        self._delta({"role": "assistant", "content": ""})
        for delta in answer.deltas:
            time.sleep(answer.pause)
            self._delta(delta)
        if answer.ends == "dead":
            return  # Without the chunk of size 0 that ends a body.
        if answer.ends == "early":
            self._chunk(b"")
            return
        if answer.ends == "silent":
            self.connection.settimeout(WAIT)
            if self.rfile.read(1) == b"":
                raise ConnectionResetError
        while answer.ends == "endless":
            self._delta(answer.deltas[-1])
            if self.server.client_left.wait(0.05):
                return
        if answer.ends == "error":
            self._event({"error": {"message": "the engine gave up", "code": 500}})
        end: list[Any] = [{"choices": [{"delta": {}, "finish_reason": answer.finish_reason}]}]
        if answer.tokens is not None:
            usage = {"prompt_tokens": 9, "completion_tokens": answer.tokens}
            end.append({"choices": [], "usage": usage})
        self._event(*end)
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _delta(self, delta: dict[str, str] | str) -> None:
        said = {"content": delta} if isinstance(delta, str) else delta
        self._event({"choices": [{"delta": said, "finish_reason": None}]})

    def _event(self, *events: dict[str, Any]) -> None:
        said = (f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
        self._chunk("".join(said).encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def serving(*answers: Answer) -> Iterator[FakeServer]:
    """A fake server that gives `answers`. It is closed at the end."""
    with FakeServer(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
