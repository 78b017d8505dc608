"""Kernels for integer linear layers beside vLLM's own."""

import os

import pytest
import torch
import vllm._custom_ops  # noqa: F401  which loads vLLM's library for this CPU

from lvllm.upstream import integer_linear
from lvllm.upstream.integer_linear import DISABLED, NEEDS_AVX512


@pytest.mark.parametrize("given", ["", "SomeKernel", f"SomeKernel,{NEEDS_AVX512}"])
def test_a_kernel_without_its_operator_is_not_chosen(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DISABLED, given)
    integer_linear.register()
    integer_linear.register()  # Plugins are loaded more than once.
    found = os.environ[DISABLED].split(",")
    missing = not hasattr(torch.ops._C, "cpu_gemm_wna16")
    wanted = set(filter(None, given.split(","))) | ({NEEDS_AVX512} if missing else set())
    assert sorted(filter(None, found)) == sorted(wanted)
