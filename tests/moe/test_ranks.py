"""How the ranks of a parallel run divide experts and cores, and how they exchange tokens."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from lvllm import prepare, startup
from lvllm.engine import ExpertLayer
from lvllm.moe.method import HybridMoEMethod
from lvllm.patches import collectives

EXPERTS, TOPK, HIDDEN, INTERMEDIATE, TOKENS = 7, 3, 96, 72, 19


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_compute_each_expert_once(ranks: int, placement: Any) -> None:
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(TOPK)
    ids = ids.int()
    ids[4], ids[7, 1] = -1, -1  # a row that pads the batch
    # The constructor needs a whole vLLM.
    method: Any = HybridMoEMethod.__new__(HybridMoEMethod)
    method.operator, method.moe = torch.ops.lvllm.expert_block, SimpleNamespace(num_experts=EXPERTS)

    def rank_of(expert_map: torch.Tensor | None, mine: Any) -> torch.Tensor:
        layer = ExpertLayer(format="bf16", w13=w13[mine].bfloat16(), w2=w2[mine].bfloat16())
        moe = SimpleNamespace(
            expert_map=expert_map,
            engine=layer,
            engine_handle=layer.handle,
            e_score_correction_bias=None,
        )
        out = method.apply(moe, x.bfloat16(), weights, ids, None, None)
        return out.float()

    parts = []
    for rank in range(ranks):
        held, expert_map, _ = determine_expert_map(ranks, rank, EXPERTS, placement)
        assert expert_map is not None
        mine = (expert_map >= 0).nonzero().flatten()
        assert len(mine) == held < EXPERTS
        parts.append(rank_of(expert_map, mine[expert_map[mine].argsort()]))
    whole = rank_of(None, slice(None))
    assert not whole[4].any()
    # Each part is rounded to bfloat16 by itself.
    assert (sum(parts) - whole).norm() <= 5e-3 * whole.norm()


@pytest.mark.parametrize(
    ("replica", "local_rank", "expected"), [(None, 1, 1), (0, 1, 1), (1, 0, 2), (2, 1, 5)]
)
def test_workers_of_a_host_are_numbered_through_all_replicas(
    replica: int | None, local_rank: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = SimpleNamespace(data_parallel_rank_local=replica, local_world_size=2)
    current = SimpleNamespace(parallel_config=parallel)
    group = SimpleNamespace(local_rank=local_rank)
    monkeypatch.setattr(startup, "get_current_vllm_config", lambda: current)
    monkeypatch.setattr(startup, "get_world_group", lambda: group)
    assert startup.host_rank() == expected


@pytest.mark.parametrize(
    ("size", "local_size", "rank", "local_rank", "expected"),
    [
        (1, 1, 0, None, 1),
        (1, 0, 0, None, 1),
        (4, 2, 0, None, 2),  # started by `vllm serve`
        (4, 1, 1, 1, 4),  # started one by one
        (4, 1, 3, 1, 2),  # on the second of two hosts
    ],
)
def test_replicas_of_a_host_are_counted(
    size: int, local_size: int, rank: int, local_rank: int | None, expected: int
) -> None:
    parallel = SimpleNamespace(
        data_parallel_size=size,
        data_parallel_size_local=local_size,
        data_parallel_rank=rank,
        data_parallel_rank_local=local_rank,
    )
    assert prepare.replicas_here(parallel) == expected


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """Run work(rank) in forked processes; AssertionError if one of them raises."""
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            try:
                work(rank)
            except BaseException:
                traceback.print_exc(file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 5, 2)])
def test_rows_are_gathered_and_their_sums_scattered(sizes: tuple[int, ...], tmp_path: Path) -> None:
    rows = [torch.randn(size, 2, 5).bfloat16() for size in sizes]
    partial = [torch.randn(sum(sizes), 4).double() for _ in sizes]

    def work(rank: int) -> None:
        file = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group(
            "gloo", init_method=file, rank=rank, world_size=len(sizes)
        )
        group = torch.distributed.group.WORLD
        assert torch.equal(collectives.all_gatherv(rows[rank], sizes, group), torch.cat(rows))
        mine = collectives.reduce_scatterv(partial[rank], sizes, group)
        expected = torch.stack(partial).sum(0).split(list(sizes))[rank]
        assert torch.allclose(mine, expected)

    in_processes(len(sizes), work)


def test_a_step_without_requests_has_attention_of_zeros() -> None:
    """The rows of such a step go through the experts of all replicas, so they must not be NaN."""
    collectives.clear_dummy_attention.install()
    attention: Any = object.__new__(CPUAttentionBackendImpl)
    output = torch.full((TOKENS, HIDDEN), float("nan"))
    assert attention.forward(None, *[None] * 5, output=output) is output
    assert not output.any()
