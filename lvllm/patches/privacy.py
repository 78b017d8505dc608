"""What vLLM would give away: to who has no API key, and to who reads its log."""

from dataclasses import replace
from typing import Any

from lvllm.patches.registry import patch

__all__ = ["ask_everywhere", "hide_what_was_asked"]

OPEN = ("/health", "/load", "/metrics", "/ping", "/version")
"""What answers without the API key, because programs that supervise servers have none."""


@patch(
    "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.__call__",
    signature="(self, scope, receive, send)",
    why="vLLM asks for the API key only below /v1, /v2, /inference and /cohere. Without a key,"
    " /invocations computes answers, and others (/tokenize, /score, /rerank, /pooling, /classify)"
    " use the model. All paths but those for supervision ask for it.",
    upstream="none, because vLLM documents it: https://docs.vllm.ai/en/latest/usage/security.html",
    until="vLLM asks for the key wherever the model is used",
)
def ask_everywhere(original: Any) -> Any:
    from starlette.datastructures import Headers
    from starlette.responses import JSONResponse

    def __call__(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        request = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        if request:
            path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
            if path not in OPEN and not self.verify_token(Headers(scope=scope)):
                answer = JSONResponse({"error": "Unauthorized"}, status_code=401)
                return answer(scope, receive, send)
        return original(self, scope, receive, send)

    return __call__


@patch(
    "vllm.v1.core.sched.output:NewRequestData.anon_repr",
    signature="(self)",
    why="An engine that fails writes what it was computing to the log. vLLM leaves the prompt out,"
    " but not the rest of a request: stop words, JSON schemas of tools and answers, pictures.",
    upstream="none, because nothing was proposed yet",
    until="vLLM leaves out everything that a client wrote",
)
def hide_what_was_asked(original: Any) -> Any:
    def anon_repr(self: Any) -> str:
        found: str = original(replace(self, sampling_params=None, mm_features=[]))
        return found

    return anon_repr
