"""Connections to the OpenAI-compatible server that is measured.

A server on this machine is asked directly, whatever proxy the environment names.
"""

from typing import TYPE_CHECKING

from lvllm.evaluation.errors import EvaluationError
from lvllm.loopback import is_here

if TYPE_CHECKING:
    import httpx
    import openai

__all__ = ["http_client", "openai_client"]

SECONDS = 600
"""How long an answer may take, as in OpenAI's client."""


def openai_client(base_url: str, api_key: str) -> "openai.OpenAI":
    """A client of the server at `base_url`, which ends in `/v1`.

    `api_key` may be empty. Raises EvaluationError if `base_url` is no URL.
    """
    import openai

    # OpenAI's client wants a key for servers that ask for none, too.
    http = openai.DefaultHttpxClient(trust_env=not _is_here(base_url))
    return openai.OpenAI(base_url=base_url, api_key=api_key or "EMPTY", http_client=http)


def http_client(base_url: str, api_key: str) -> "httpx.Client":
    """The same for requests that OpenAI's client does not know."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(headers=headers, timeout=SECONDS, trust_env=not _is_here(base_url))


def _is_here(url: str) -> bool:
    import httpx

    try:
        return is_here(url)
    except httpx.InvalidURL as error:
        raise EvaluationError(f"{url} is no URL: {error}") from None
