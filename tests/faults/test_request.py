"""A fault on its way to the client."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from lvllm.faults import request
from lvllm.faults.request import ExpertFault
from lvllm.metrics import memory
from lvllm.patches import failures

TEXT = "model.layers.3.mlp.experts: expert 5 makes NaN or infinity of finite numbers"


def test_the_client_sees_status_500_and_the_layer() -> None:
    response = create_error_response(ExpertFault(TEXT))
    assert (response.error.code, response.error.message) == (500, TEXT)


@pytest.fixture
def make() -> Any:
    """RequestState.make_request_output, on a request with or without somebody who waits for it."""
    failures.answer_with_the_fault.install()
    failures.answer_with_the_fault.install()  # every process may load plugins more than once
    put: list[Exception] = []

    def call(waiting: bool, pooling_output: torch.Tensor | None) -> list[Exception]:
        queue = SimpleNamespace(put=put.append) if waiting else None
        state = SimpleNamespace(queue=queue)
        error: Any = FinishReason.ERROR
        assert RequestState.make_request_output(state, [], pooling_output, error, TEXT) is None
        return put

    return call


@pytest.mark.parametrize("pooling_output", [None, torch.empty(0)])
def test_who_waits_gets_an_exception(make: Any, pooling_output: torch.Tensor | None) -> None:
    (error,) = make(True, pooling_output)
    assert isinstance(error, ExpertFault)
    assert str(error) == TEXT


def test_an_embedding_that_is_none_is_not_returned(make: Any) -> None:
    with pytest.raises(ExpertFault, match=r"layers\.3"):
        make(False, torch.empty(0))


def test_requests_that_end_so_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory._VARIABLE, "")
    memory.prepare()
    running = SimpleNamespace(is_finished=lambda: False)
    scheduler = SimpleNamespace(
        vllm_config=SimpleNamespace(
            kv_transfer_config=None, parallel_config=SimpleNamespace(data_parallel_index=1)
        ),
        requests={"a": running, "b": running, "ended": SimpleNamespace(is_finished=lambda: True)},
        kv_cache_manager=SimpleNamespace(get_blocks=lambda _: SimpleNamespace(blocks=[])),
        finish_requests=lambda *_: None,
    )
    reader = memory.Reader()
    request.end_requests(scheduler, {})
    ((block, numbers),) = reader.read()
    assert (block.labels, numbers.tolist()) == ({"engine": "1"}, [0])
    request.end_requests(scheduler, dict.fromkeys(("a", "b", "ended", "gone"), TEXT))
    ((_, numbers),) = reader.read()
    assert numbers.tolist() == [2]
    memory.close()
