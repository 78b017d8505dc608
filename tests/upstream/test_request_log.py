"""What vLLM logs of a request for Anthropic's interface: nothing that the client wrote."""

import logging
import random
from collections.abc import Iterator

import pytest
from vllm.exceptions import VLLMValidationError

from lvllm.upstream import request_log


@pytest.fixture(params=request_log.LOGGERS)
def log(request: pytest.FixtureRequest) -> Iterator[logging.Logger]:
    found = logging.getLogger(request.param)
    before, level = list(found.filters), found.level
    request_log.hide_requests()
    found.setLevel(logging.DEBUG)
    yield found
    found.filters, found.level = before, level


def records(log: logging.Logger, error: Exception | None) -> list[str]:
    """What a handler gets of a line at each level, with `error` as its reason."""
    found: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Handler()
    log.addHandler(handler)
    for level in (logging.DEBUG, logging.INFO, logging.ERROR):
        log.log(level, "refused: %s", error, exc_info=error)
    log.removeHandler(handler)
    return [record.levelname for record in found]


def test_a_refused_request_is_not_logged(log: logging.Logger) -> None:
    word = f"secret {random.random()}"
    for error in (ValueError(word), TypeError(word), VLLMValidationError(word)):
        assert records(log, error) == []


def test_faults_of_the_server_are(log: logging.Logger) -> None:
    for error in (None, RuntimeError("no memory"), KeyError("index")):
        assert records(log, error) == ["INFO", "ERROR"]
