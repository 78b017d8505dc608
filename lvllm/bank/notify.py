"""Tells systemd about this process (sd_notify): a datagram to the socket that systemd names."""

import os
import socket

__all__ = ["notify"]


def notify(state: str) -> None:
    """Send lines such as `READY=1`. Without systemd (no NOTIFY_SOCKET) this does nothing."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    address = f"\0{name[1:]}" if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.sendto(state.encode(), address)
