from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    threads: int
    activation_bits: int | None = None
    """Of lk alone; None is its default."""


class Refused(Exception):
    """Why an engine does not compute a shape or format."""
