"""A server's metrics at one moment."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lvllm.errors import LvllmError
from lvllm.loopback import is_here

__all__ = ["Scrape", "TopError", "parse", "scrape"]

SECONDS = 10
"""How long the server may take to answer."""

_Sample = tuple[Mapping[str, str], float]


class TopError(LvllmError):
    """There is no server, or it has no metrics of LvLLM."""


@dataclass(frozen=True)
class Scrape:
    """All values of `/metrics`, and when they were read, by `time.monotonic()`."""

    at: float
    samples: Mapping[str, list[_Sample]] = field(default_factory=dict)

    def found(self, name: str, **labels: str) -> Iterable[_Sample]:
        """The values under a name that have these labels, among others."""
        for own, value in self.samples.get(name, ()):
            if labels.items() <= own.items():
                yield own, value

    def sum(self, name: str, **labels: str) -> float:
        """The sum of these values; 0 if there are none."""
        return sum(value for _, value in self.found(name, **labels))

    def by(self, *by: str, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """The sums of these values for each value of some labels, in the order of appearance."""
        sums: dict[tuple[str, ...], float] = {}
        for own, value in self.found(name, **labels):
            key = tuple(own.get(label, "") for label in by)
            sums[key] = sums.get(key, 0.0) + value
        return sums


def parse(text: str, at: float) -> Scrape:
    """Read what `/metrics` answered. Raises ValueError if it is something else."""
    samples: dict[str, list[_Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return Scrape(at, samples)


def scrape(url: str) -> Scrape:
    """The metrics of the server at this base URL.

    Raises TopError, in one line, if it does not answer or is no server of LvLLM.
    """
    address = f"{url.rstrip('/')}/metrics"
    try:
        answer = httpx.get(address, timeout=SECONDS, trust_env=not is_here(address))
        answer.raise_for_status()
        found = parse(answer.text, time.monotonic())
    except httpx.HTTPStatusError as error:
        said = f"{error.response.status_code} {error.response.reason_phrase}"
        raise TopError(f"{address}: the server answers {said}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TopError(f"{address}: {error or type(error).__name__}; is a server there?") from None
    except ValueError:
        raise TopError(f"{address}: the answer is no metrics") from None
    if not any(name.startswith("lvllm_") for name in found.samples):
        raise TopError(
            f"{address}: the server has no metrics of LvLLM; was it started with"
            " LVLLM_MOE_NUMA_ENABLED=1?"
        )
    return found
