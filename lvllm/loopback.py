"""This machine's addresses, which a proxy of the environment (`HTTP_PROXY`) cannot reach."""

from collections.abc import Mapping

import httpx

__all__ = ["LOOPBACK", "around_proxies", "is_here"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def is_here(url: str) -> bool:
    """Whether the host of `url` is this machine. Raises httpx.InvalidURL."""
    return httpx.URL(url).host in LOOPBACK


def around_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a program that is to ask no proxy for this machine's addresses.

    Programs read the variable in lower case, in upper case, or both.
    """
    names = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if names.strip() != "*":  # no proxy at all
        names = ",".join([*filter(None, [names]), *LOOPBACK])
    return {**environ, "no_proxy": names, "NO_PROXY": names}
