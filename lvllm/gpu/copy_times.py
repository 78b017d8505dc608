"""Counts the copies of groups of experts, once the times of their marks are known."""

from collections import deque
from dataclasses import dataclass

from lvllm.gpu.accelerator import Accelerator, Mark
from lvllm.gpu.counters import StreamedCounters

__all__ = ["CopyTimes", "GroupTimes"]


@dataclass(frozen=True)
class GroupTimes:
    """A group whose work is in the streams."""

    counters: StreamedCounters
    size: int
    """The bytes that were copied."""
    ahead: bool
    """Whether the copy had been queued before the layer was asked for."""
    begun: Mark
    copied: Mark
    """Around the copy."""
    asked: Mark
    """Where the compute stream began to wait for the copy."""
    computed: Mark
    """Where its products end."""


class CopyTimes:
    """Groups that have been computed, in the order of the compute stream."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._groups: deque[GroupTimes] = deque()

    def add(self, group: GroupTimes) -> None:
        """Count this group when its times are known."""
        self._groups.append(group)

    def tally(self) -> None:
        """Count the groups that have been computed by now.

        This must not be called while a graph is captured.
        """
        seconds = self._accelerator.seconds
        while self._groups:
            group = self._groups[0]
            since_asked = seconds(group.asked, group.computed)
            since_copied = seconds(group.copied, group.computed)
            waited = seconds(group.asked, group.copied)
            copying = seconds(group.begun, group.copied)
            if since_asked is None or since_copied is None or waited is None or copying is None:
                return
            self._groups.popleft()
            # The products begin when they have been asked for and the copy is complete.
            computing = min(since_asked, since_copied)
            group.counters.add_times(group.size, copying, waited, computing, group.ahead)
