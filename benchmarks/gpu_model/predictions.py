"""All predictions of a model on a machine."""

from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.gpu_model.decode import Step, step
from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.models import CHUNK, needs, resident_that_fit, slots_share
from benchmarks.gpu_model.prefill import Prefill, Spent
from lvllm.planning.hits import EVEN, SKEWED, saved
from lvllm.planning.placement import Load
from lvllm.units import MIB

__all__ = ["LONG", "Prediction"]

LONG = 4 * CHUNK
ANSWER = 512
CURVES = {"even": EVEN, "skewed": SKEWED}
DEFERRED = 2
"""Experts of a token that may be deferred."""


@dataclass(frozen=True)
class Prediction:
    """A model on a machine. All experts are on the host, if nothing else is said."""

    parts: Parts

    @cached_property
    def lacks(self) -> str | None:
        """What does not fit; None if the model with one user does."""
        return self.needs_of(1)

    def needs_of(self, users: int, chunk: int = CHUNK, prompt: int = CHUNK) -> str | None:
        """What does not fit for so many users, with as many resident layers as fit."""
        load = Load(users=users, context=prompt + ANSWER, batch=chunk)
        kept = resident_that_fit(self.parts.model, self.parts.machine, load)
        return needs(self.parts.model, self.parts.machine, load, kept).lacks

    @cached_property
    def prefill(self) -> Prefill:
        return Prefill(self.parts)

    @cached_property
    def short(self) -> Spent:
        """A prompt of CHUNK tokens."""
        return self.prefill.prompt(CHUNK)

    def long(self, chunk: int) -> Spent | None:
        """A prompt of LONG tokens in such chunks; None if these do not fit."""
        return None if self.needs_of(1, chunk, LONG) else self.prefill.prompt(LONG, chunk)

    def staged(self, mib: int) -> Spent:
        """A prompt of CHUNK tokens with another staging ring."""
        return Prefill(self.parts, staging=mib * MIB).prompt(CHUNK)

    def decode(self, users: int) -> Step | None:
        """No expert is on the GPU."""
        return None if self.needs_of(users) else step(self.parts, users, CHUNK)

    def resident(self, users: int) -> tuple[int, Step]:
        """Whole layers that fit are on the GPU."""
        count = resident_that_fit(self.parts.model, self.parts.machine, self._load(users))
        return count, step(self.parts, users, CHUNK, resident=count)

    def cached(self, users: int, skew: str) -> Step:
        """The experts that are used most are on the GPU, as many as fit."""
        share = slots_share(self.parts.model, self.parts.machine, self._load(users))
        return step(self.parts, users, CHUNK, saved=saved(share, users, CURVES[skew]))

    def deferred(self, users: int) -> Step:
        """DEFERRED experts of each token may end a layer later."""
        share = DEFERRED / self.parts.model.moe_layers[0].chosen
        return step(self.parts, users, CHUNK, deferred=share)

    def mailbox(self, users: int) -> Step:
        """The calls are through a mailbox."""
        return step(replace(self.parts, mailbox=True), users, CHUNK)

    def _load(self, users: int) -> Load:
        return Load(users=users, context=CHUNK + ANSWER, batch=CHUNK)
