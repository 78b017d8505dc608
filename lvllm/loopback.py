"""This machine's addresses, which a proxy of the environment (`HTTP_PROXY`) cannot reach."""

import httpx

__all__ = ["LOOPBACK", "is_here"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def is_here(url: str) -> bool:
    """Whether the host of `url` is this machine. Raises httpx.InvalidURL."""
    return httpx.URL(url).host in LOOPBACK
