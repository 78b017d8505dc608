"""Tests the kernels of experts: what they compute, and what they take on each kind of GPU."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_kernels.compiled import SHARED_KIB, compile_launch
from benchmarks.gpu_kernels.launches import launches
from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.gpu.kernels import BLOCK_ROWS
from tests.gpu.kernel import WAYS
from tests.random_layers import ACTIVATIONS, FORMATS

BLOCKS = tuple(BLOCK_FORMATS)
ARCHITECTURES = (*SHARED_KIB,)
SCALED = [(format, how) for format, ways in WAYS.items() for how in ways]


@pytest.mark.slow
def test_they_compute_the_expert_block() -> None:
    """They run in Triton's interpreter, which must be chosen before they are imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.kernel", str(secrets.randbelow(2**31))],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.args}: {done.stderr}"
    assert done.stdout == "22 variants\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", range((len(BLOCKS) + 1) // 2))
def test_they_fit_with_every_type_of_gguf(number: int) -> None:
    """Gate and up have one of two types, and down has the other."""
    w13, w2 = BLOCKS[2 * number], BLOCKS[2 * number - 1]
    architecture = ARCHITECTURES[number % len(ARCHITECTURES)]
    for launch in launches(w13, tokens_per_expert=128, w2_format=w2)[:2]:
        assert w13 in launch.arguments.values() or w2 in launch.arguments.values()
        taken = compile_launch(launch, architecture)
        assert taken.shared <= SHARED_KIB[architecture] << 10
        assert taken.spilled <= 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "gate", "up"), [(90, "q4_k", "q6_k"), (89, "iq2_s", "iq3_s")]
)
def test_they_fit_if_gate_and_up_have_two_types(architecture: int, gate: str, up: str) -> None:
    launch = launches(gate, tokens_per_expert=128, w3_format=up)[0]
    assert {gate, up} <= set(launch.arguments.values())
    taken = compile_launch(launch, architecture)
    assert taken.shared <= SHARED_KIB[architecture] << 10
    assert taken.spilled <= 32


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCALED)))
def test_they_compile_with_every_scale_and_activation(number: int) -> None:
    """Triton's interpreter takes more than its compiler does: two results of two shapes, say."""
    format, how = SCALED[number]
    more = {
        "activation": ACTIVATIONS[number % len(ACTIVATIONS)],
        "bias": number % 2 == 0,
        "apply_router_weight_on_input": number % 3 == 0,
    }
    for launch in launches(format, tokens_per_expert=BLOCK_ROWS[0], **how, **more)[:2]:
        assert compile_launch(launch, ARCHITECTURES[0]).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_they_fit_on_every_architecture(number: int) -> None:
    """Each kernel does: those of streamed groups in one format, those of slots in another one.

    benchmarks/gpu_kernels compiles every format in every size of blocks for every architecture.
    """
    architecture, rows = ARCHITECTURES[number % len(ARCHITECTURES)], BLOCK_ROWS[number % 2]
    streamed = launches(FORMATS[number], tokens_per_expert=BLOCK_ROWS[-1])[:3]
    started = streamed + launches(FORMATS[number - 3], tokens_per_expert=rows)[3:]
    names = [launch.kernel.__name__ for launch in started]
    products = ["_gate_up", "_down", "_add_up"]
    assert names == [*products, *products, "_split", "_exchange"]
    sizes = [launch.arguments["ROWS"] for launch in started if "ROWS" in launch.arguments]
    assert sizes == [BLOCK_ROWS[-1]] * 2 + [rows] * 2
    for launch in started:
        taken = compile_launch(launch, architecture)
        assert taken.shared <= SHARED_KIB[architecture] << 10
        # A few bytes are spilled outside of the loop over the columns.
        assert taken.spilled <= 32
