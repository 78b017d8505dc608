"""What stands in vLLM's way to a picture, in this process."""

import importlib
from typing import Any

import pytest

from lvllm.patches import pictures


def test_vllms_search_for_kernels_passes_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    monkeypatch.delattr(dispatcher, "vars", raising=False)
    strange: Any = importlib.import_module("llvmlite.binding.ffi").lib
    assert not hasattr(vars(strange), "get"), "vLLM's search no longer needs help"
    pictures.skip_strange_objects.install()
    dispatcher._rebind_kernels([])
