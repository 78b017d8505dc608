"""File systems that only a process and its children see."""

import ctypes
import os
import subprocess

__all__ = ["mount_for_itself"]

NEW_MOUNTS = 0x20000
"""CLONE_NEWNS."""
LIBC = ctypes.CDLL(None, use_errno=True)


def mount_for_itself(folder: str | os.PathLike[str], size: str) -> None:
    """Let this process and its children see an empty file system in the place of `folder`.

    Raises OSError if this process may not.
    """
    if LIBC.unshare(NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
