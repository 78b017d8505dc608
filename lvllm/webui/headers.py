"""The headers with which the page is sent: the browser then asks nobody but this program."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CHAT", "LOADING", "with_headers"]

EVERYWHERE = {
    # Pages of other origins can neither show this one in a frame nor read its answers.
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def _policy(**more: str) -> str:
    """A Content-Security-Policy for this origin alone, and for what `more` adds to a directive."""
    allowed = {
        "default-src": "'self'",
        "frame-ancestors": "'none'",
        "object-src": "'none'",
        "base-uri": "'self'",
        "form-action": "'self'",
    }
    allowed |= {name.replace("_", "-"): f"'self' {sources}" for name, sources in more.items()}
    return "; ".join(f"{name} {sources}" for name, sources in allowed.items())


LOADING = EVERYWHERE | {"Content-Security-Policy": _policy(), "Cache-Control": "no-store"}
"""For the page that shows how a model is loaded."""
CHAT = EVERYWHERE | {
    # gradio has its configuration in scripts within the page, and styles in its elements.
    # An answer may name pictures of other machines: fetching one would tell them what it says.
    "Content-Security-Policy": _policy(
        script_src="'unsafe-inline'",
        style_src="'unsafe-inline'",
        img_src="data: blob:",
        media_src="data: blob:",
        font_src="data:",
    )
}
"""For the chat."""


def with_headers(app: ASGIApp, headers: Mapping[str, str]) -> ASGIApp:
    """`app`, whose answers have these headers instead of its own of the same names."""
    ours = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    names = {name for name, _ in ours}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [one for one in message.get("headers", ()) if one[0].lower() not in names]
                message = {**message, "headers": [*own, *ours]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return answer
