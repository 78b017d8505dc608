"""A hub on this machine that answers as the Hugging Face hub does, for one repository."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

NAME = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """The files of the repository, and the names of those that were fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: list[str] = []
        self.url = ""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{NAME}/tree/"):
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in hub.files.items()
                ]
                return self._send(json.dumps(tree).encode(), {}, body)
            if path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": n, "size": len(c)} for n, c in hub.files.items()]
                info = {"id": NAME, "sha": COMMIT, "siblings": siblings}
                return self._send(json.dumps(info).encode(), {}, body)
            file = path.removeprefix(f"/{NAME}/resolve/").partition("/")[2]
            if not path.startswith(f"/{NAME}/resolve/") or file not in hub.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            content = hub.files[file]
            if body:
                hub.fetched.append(file)
            tag = hashlib.sha256(content).hexdigest()
            return self._send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

        def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
