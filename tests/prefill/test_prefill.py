"""The parts of the hand-over from a prefill engine to a decoding engine."""

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm.metrics import memory
from lvllm.prefill import client, configuration, decode_side, executors, prefill_side
from lvllm.prefill.caches import BlockCopy, BlockSize, CopyPlan, LayerCaches
from lvllm.prefill.memory import MemoryAddress, OwnedMemory
from lvllm.settings.configuration import RESOLVED, HybridConfig, PrefillEngine
from lvllm.settings.use_weight import LayerFormats
from lvllm.settings.variables import ThreadBinding

BLOCK = 16


def cache_config(blocks: int = 50) -> Any:
    spec = SimpleNamespace(block_size=BLOCK)
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)], num_blocks=blocks)


def open_memories() -> int:
    """How many prompts have memory that this process keeps open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.exists(path := f"/proc/self/fd/{descriptor}"):
            links.append(os.readlink(path))
    return sum("lvllm-prefill" in link for link in links)


def grouped(blocks: int) -> dict[str, torch.Tensor]:
    """Grouped attention: layers [blocks, heads, tokens, 2 * size], stored tokens first."""
    return {
        f"{n}": torch.randn(blocks, BLOCK, 3, 64).to(torch.bfloat16).transpose(1, 2)
        for n in range(3)
    }


def latent(blocks: int) -> dict[str, torch.Tensor]:
    """Latent attention: a block of all layers is one piece of memory.

    One layer has an index of bytes as well, and two layers share a cache.
    """
    pages = torch.randn(blocks, 2, 1, BLOCK, 96).to(torch.bfloat16)
    index = torch.randint(0, 256, (blocks, 1, BLOCK, 33), dtype=torch.uint8)
    return {"0": pages[:, 0], "1": pages[:, 1], "1.index": index, "2": pages[:, 1]}


@pytest.mark.parametrize(
    ("layout", "block_bytes"),
    [(grouped, 3 * BLOCK * 3 * 64 * 2), (latent, 2 * BLOCK * 96 * 2 + BLOCK * 33)],
)
def test_blocks_arrive_where_they_belong(layout: Any, block_bytes: int) -> None:
    theirs, ours = layout(40), layout(23)
    before = {name: cache.clone() for name, cache in ours.items()}
    prefill, decode = LayerCaches(theirs, 40), LayerCaches(ours, 23)
    assert prefill.block_bytes == decode.block_bytes == block_bytes
    held = OwnedMemory(7, prefill.block_bytes)
    source, target = random.sample(range(40), 7), random.sample(range(23), 5)
    memory = prefill.open(held.address)
    for first, last in ((0, 3), (3, 7)):
        assert memory.count == first
        prefill.save(memory, BlockCopy("r", held.address, first, tuple(source[first:last])))
    held.close()
    arrived = BlockCopy("r", held.address, 2, tuple(target))
    decode.load(memory, arrived)
    for name, cache in ours.items():
        assert torch.equal(cache[target], theirs[name][source[2:]]), name
        rest = [block for block in range(23) if block not in target]
        assert torch.equal(cache[rest], before[name][rest]), name


def test_memory_that_cannot_be_used() -> None:
    caches = LayerCaches(latent(9), 9)
    held = OwnedMemory(3, caches.block_bytes)
    memory = caches.open(held.address)
    caches.save(memory, BlockCopy("r", held.address, 0, (4, 5)))
    with pytest.raises(ValueError, match="only 2 of 3 blocks are there"):
        caches.load(memory, BlockCopy("r", held.address, 1, (6, 7)))
    with pytest.raises(ValueError, match="the engines' caches are not alike"):
        LayerCaches(grouped(9), 9).open(held.address)
    with pytest.raises(FileNotFoundError, match="is another file by now"):
        caches.open(MemoryAddress(held.address.path, held.address.inode + 1, 3))
    del memory
    held.close()
    with pytest.raises(FileNotFoundError):
        caches.open(held.address)
    with pytest.raises(ValueError, match=r"the cache of odd has the shape \(4, 2\), not 9 blocks"):
        LayerCaches({"odd": torch.zeros(4, 2)}, 9)
    assert open_memories() == 0


def step(scheduled: dict[str, tuple[int, int]], new: bool, blocks: Any) -> Any:
    """A scheduler's output, given how many tokens each request had and how many are computed."""
    fields = [SimpleNamespace(req_id=r, num_computed_tokens=n) for r, (n, _) in scheduled.items()]
    cached = SimpleNamespace(
        req_ids=[] if new else list(scheduled),
        num_computed_tokens=[] if new else [n for n, _ in scheduled.values()],
    )
    return SimpleNamespace(
        scheduled_new_reqs=fields if new else [],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={request: n for request, (_, n) in scheduled.items()},
        total_num_scheduled_tokens=sum(n for _, n in scheduled.values()),
        kv_connector_block_state=SimpleNamespace(resolve_block_ids=blocks),
    )


def test_a_prompt_is_saved_as_it_is_computed() -> None:
    """Full blocks are saved after each step, also those of the prefix cache, and at last the rest.

    A request that is preempted saves nothing twice.
    """
    address = MemoryAddress("/none", 1, 6)
    scheduler = prefill_side.SchedulerPart(None, cache_config())
    request = SimpleNamespace(
        request_id="r", kv_transfer_params=address.params(), num_prompt_tokens=5 * BLOCK + 3
    )
    scheduler.add(request)
    steps = [(2 * BLOCK, 20, True, (0, 3)), (2 * BLOCK + 20, 4, False, None)]
    # The request is preempted here, and begins again in other blocks.
    steps += [(0, 2 * BLOCK, False, None), (2 * BLOCK, 3 * BLOCK, False, (3, 5))]
    steps += [(5 * BLOCK, 3, False, (5, 6)), (5 * BLOCK + 3, 1, False, None)]
    for computed, more, new, saved in steps:
        ids = random.sample(range(50), 7)
        planned = scheduler.plan(step({"r": (computed, more)}, new, lambda _, ids=ids: (ids,)))
        expected = (
            [] if saved is None else [BlockCopy("r", address, saved[0], tuple(ids[slice(*saved)]))]
        )
        assert planned.copies == expected, (computed, more)
    scheduler.finished(request)
    assert scheduler.plan(step({"r": (90, 1)}, False, None)).copies == []


def test_who_saves_for_a_prompt_that_is_gone() -> None:
    worker = prefill_side.WorkerPart(None, cache_config(9))
    worker.register(grouped(9))
    held = OwnedMemory(2, LayerCaches(grouped(9), 9).block_bytes)
    kept = OwnedMemory(2, LayerCaches(grouped(9), 9).block_bytes)
    held.close()
    copies = [BlockCopy("gone", held.address, 0, (1,)), BlockCopy("kept", kept.address, 0, (1, 2))]
    worker.save(CopyPlan(copies))
    assert LayerCaches(grouped(9), 9).open(kept.address).count == 2
    worker.results({"gone", "kept"})
    assert worker._open == {}
    kept.close()


@dataclass
class Client:
    """Stands in for the prefill engine."""

    blocks: int = 10
    process: int = 4711
    ended: bool = False
    sent: dict[str, MemoryAddress] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    results: list[tuple[str, bool]] = field(default_factory=list)

    def send(self, name: str, request: Any, address: MemoryAddress) -> None:
        self.sent[name] = address

    def abort(self, name: str) -> None:
        self.aborted.append(name)

    def done(self, seconds: float = 0) -> list[tuple[str, bool]]:
        found, self.results = self.results, []
        return found

    def shutdown(self) -> None:
        pass


def request(name: str, tokens: int, **fields: Any) -> Any:
    nothing = {"pooling_params": None, "prompt_embeds": None, "lora_request": None}
    others = {"mm_features": [], "resumable": False, "skip_reading_prefix_cache": False}
    return SimpleNamespace(request_id=name, num_tokens=tokens, **nothing | others | fields)


def blocks(ids: list[int]) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (ids,))


IDLE = SimpleNamespace(total_num_scheduled_tokens=0)


def loaded(*requests: str, failed: bool = False) -> Any:
    return SimpleNamespace(
        finished_recving=set(requests), failed_recving=set(requests if failed else ())
    )


def decoding(**extra: Any) -> Any:
    """The configuration of a decoding engine, as far as its scheduler's part reads it."""
    transfer = connector_config(**extra)
    transfer.is_kv_producer = False
    parallel = SimpleNamespace(data_parallel_index=0)
    return SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The decoding engine's scheduler: prompts of 40 tokens are long."""
    monkeypatch.setattr(client, "Client", lambda *given: Client())
    scheduler = decode_side.SchedulerPart(decoding(min_tokens=40), cache_config())
    scheduler.start({0: BlockSize(64)})
    yield scheduler
    assert open_memories() == 0


def test_the_way_of_a_long_prompt(router: Any) -> None:
    client = router._client
    asked = request("a", 3 * BLOCK + 2)
    assert router.match(request("short", 39), 0) == (0, False)
    assert router.match(request("cached", 50), BLOCK) == (0, False)
    assert router.match(asked, 0) == (None, False)
    ((name, address),) = client.sent.items()
    assert address.blocks == 4
    assert router.match(asked, 0) == (None, False)
    assert router.plan(IDLE).copies == []
    client.results = [(name, True)]
    # Meanwhile another request has computed the first block in this engine.
    assert router.match(asked, BLOCK) == (2 * BLOCK + 2, True)
    assert router.match(asked, BLOCK) == (2 * BLOCK + 2, True)
    router.allocated(asked, blocks([7, 8, 9, 10]), 2 * BLOCK + 2)
    assert router.plan(IDLE).copies == [BlockCopy("a", address, 1, (8, 9, 10))]
    assert router.plan(IDLE).copies == []
    assert open_memories() == 1
    router.arrived(loaded("a"))
    assert open_memories() == 0
    router.allocated(asked, blocks([7, 8, 9, 10]), 0)
    # A request that is preempted after some tokens goes the same way again.
    asked.num_tokens += 9
    assert router.match(asked, 0) == (None, False)
    assert len(client.sent) == 2
    router.finished(asked)
    assert client.aborted == [list(client.sent)[1]]
    assert router._free == client.blocks


def test_a_prompt_that_has_come_into_this_engines_cache_meanwhile(router: Any) -> None:
    asked = request("a", 3 * BLOCK)
    assert router.match(asked, 0) == (None, False)
    router._client.results = [(next(iter(router._client.sent)), True)]
    assert router.match(asked, 3 * BLOCK) == (0, False)
    assert open_memories() == 1
    router.allocated(asked, blocks([1, 2, 3]), 0)
    assert open_memories() == 0
    router.finished(asked)
    assert router._free == router._client.blocks


@pytest.mark.parametrize(
    "given",
    [
        {"pooling_params": 1},
        {"prompt_embeds": 1},
        {"lora_request": 1},
        {"mm_features": [1]},
        {"resumable": True},
        {"skip_reading_prefix_cache": True},
    ],
)
def test_what_the_decoding_engine_keeps(router: Any, given: Any) -> None:
    assert router.match(request("a", 400, **given), 0) == (0, False)
    assert router._client.sent == {}


def test_prompts_wait_for_room_in_their_order(router: Any) -> None:
    """The prefill engine has 10 blocks."""
    asked = [
        request(name, tokens * BLOCK) for name, tokens in zip("abcd", (6, 5, 4, 3), strict=True)
    ]
    for waiting in asked:
        assert router.match(waiting, 0) == (None, False)
    sent = router._client.sent
    assert [name[0] for name in sent] == ["a"]
    router.finished(asked[2])  # It is aborted in the queue.
    router._client.results = [(next(iter(sent)), True)]
    assert router.match(asked[0], 0) == (6 * BLOCK, True)
    assert len(sent) == 1
    router.allocated(asked[0], blocks(list(range(6))), 6 * BLOCK)
    router.finished(asked[0])  # It is aborted while the worker loads it, which still reads.
    assert open_memories() == 1
    router.arrived(loaded("a"))
    assert [name[0] for name in sent] == ["a", "b", "d"]
    router.finished(asked[1])
    router.finished(asked[3])
    assert router._free == 10
    assert router._prompts == {}


def test_a_prompt_that_fails_is_prefilled_here(router: Any) -> None:
    for name, stage in (("prefilling", 0), ("loading", 1)):
        asked = request(name, 50)
        assert router.match(asked, 0) == (None, False)
        sent = list(router._client.sent)[-1]
        router._client.results = [(sent, bool(stage))]
        if stage:
            assert router.match(asked, 0) == (50, True)
            router.allocated(asked, blocks([1, 2, 3, 4]), 50)
            router.arrived(loaded(name, failed=True))
        assert router.match(asked, 0) == (0, False)
        assert router.match(asked, 0) == (0, False)
        router.finished(asked)
    assert router._free == 10
    assert router._prompts == {}


def test_prompts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill engine has room for the first of two prompts; the second is aborted."""
    monkeypatch.setattr(client, "Client", lambda *given: Client())
    monkeypatch.setenv(memory._VARIABLE, "")  # which is restored afterwards
    memory.prepare()
    scheduler = decode_side.SchedulerPart(decoding(min_tokens=40), cache_config())
    scheduler.start({0: BlockSize(64)})
    reader = memory.Reader()

    def counted() -> list[int]:
        ((block, numbers),) = reader.read()
        assert block.labels == {"engine": "0"}
        return [int(number) for number in numbers]

    first, second = request("a", 6 * BLOCK), request("b", 5 * BLOCK)
    assert counted() == [0] * 7
    scheduler.match(first, 0)
    scheduler.match(second, 0)
    assert counted() == [1, 1, 0, 0, 1, 0, 0]
    made: Any = scheduler._client
    made.results = [(next(iter(made.sent)), True)]
    scheduler.match(first, 0)
    scheduler.plan(IDLE)
    assert counted() == [1, 0, 1, 0, 1, 0, 0]
    scheduler.allocated(first, blocks(list(range(6))), 6 * BLOCK)
    scheduler.plan(IDLE)
    assert counted() == [1, 0, 0, 1, 1, 0, 0]
    scheduler.finished(second)
    assert counted() == [0, 0, 0, 1, 1, 0, 1]
    scheduler.arrived(loaded("a"))
    assert counted() == [0, 0, 0, 0, 1, 1, 1]
    memory.close()


def test_the_prefill_engine_ends(router: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts may be in any stage. What is computed is loaded, all others are prefilled here."""
    client = router._client
    asked = {name: request(name, n * BLOCK) for name, n in (("l", 3), ("r", 3), ("p", 4), ("q", 3))}
    for waiting in asked.values():
        assert router.match(waiting, 0) == (None, False)
    client.results = [(name, True) for name in list(client.sent)[:2]]
    assert router.match(asked["l"], 0) == (3 * BLOCK, True)
    router.allocated(asked["l"], blocks([1, 2, 3]), 3 * BLOCK)
    client.ended = True
    assert router.match(asked["p"], 0) == (0, False)
    assert router.match(asked["q"], 0) == (0, False)
    assert router.match(asked["r"], 0) == (3 * BLOCK, True)
    assert router.match(request("new", 400), 0) == (0, False)
    router.arrived(loaded("l"))
    for ended in asked.values():
        router.finished(ended)
    assert router._prompts == {}


def connector_config(**extra: Any) -> Any:
    return SimpleNamespace(kv_connector_extra_config=extra)


def engine_configuration() -> Any:
    """vLLM's configuration, as a worker on one CPU gets it."""
    own = ((min(os.sched_getaffinity(0)),),)
    resolved = HybridConfig(
        thread_binding=ThreadBinding.CPU_CORE,
        power_saving=False,
        own_cores=False,
        use_weight=LayerFormats(),
        dense_weight=None,
        quantize_on="cpu",
        activation_bits=None,
        engine_cpus=own,
        omp_cpus=own,
        numa_interleave=False,
        accelerator="none",
        gpu_resident_moe_layers=(),
        gpu_prefetch_window=0,
        gpu_staging_mib=1024,
        gpu_prefill_min_batch_size=0,
        gpu_expert_cache=(0,),
        gpu_call="hostfunc",
        defer_experts=0,
        watchdog_seconds=0,
        verify=False,
        metrics_experts=False,
        shared_experts=None,
        bank=None,
        prefill_engine=None,
    )
    return SimpleNamespace(additional_config={RESOLVED: resolved.model_dump(mode="json")})


def test_two_engines_on_one_gpu_want_mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(configuration.logger, "warning", said.append)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    resolved = HybridConfig(**engine_configuration().additional_config[RESOLVED])

    def configure(accelerator: str, gpu: int | None) -> float:
        cache = SimpleNamespace(gpu_memory_utilization=0.9)
        vllm_config = SimpleNamespace(
            cache_config=cache,
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
        )
        config = resolved.model_copy(update={"accelerator": accelerator})
        configuration.configure(vllm_config, PrefillEngine(min_tokens=512, gpu=gpu), config)
        return cache.gpu_memory_utilization

    assert configure("none", None) == configure("cuda", 1) == 0.9
    assert not said
    assert configure("cuda", None) == 0.45
    assert "take turns on the GPU, since CUDA's MPS does not run" in said.pop()
    (tmp_path / "control").touch()
    configure("cuda", None)
    assert not said


def test_loading_beside_steps() -> None:
    ours, theirs = grouped(9), grouped(9)
    worker = decode_side.WorkerPart(engine_configuration(), cache_config(9))
    worker.register(ours)
    held = OwnedMemory(2, worker.handshake().block_bytes)
    saver = LayerCaches(theirs, 9)
    saver.save(saver.open(held.address), BlockCopy("whole", held.address, 0, (3, 4)))
    part = OwnedMemory(2, worker.handshake().block_bytes)
    worker.load(
        CopyPlan(
            [
                BlockCopy("whole", held.address, 0, (5, 6)),
                BlockCopy("part", part.address, 0, (7, 8)),
            ]
        )
    )
    done: set[str] = set()
    failed: set[str] = set()
    end = time.monotonic() + 60
    while done != {"whole", "part"}:
        found = worker.results(set())
        done |= found.finished_recving
        failed |= found.failed_recving
        assert time.monotonic() < end
    assert failed == {"part"}
    assert all(torch.equal(ours[name][[5, 6]], theirs[name][[3, 4]]) for name in ours)
    worker.shutdown()
    held.close()
    part.close()


@pytest.mark.parametrize("side", [decode_side, prefill_side])
def test_a_worker_may_end_before_it_has_its_caches(side: Any) -> None:
    """A worker whose caches do not fit is shut down, which must not hide the reason."""
    unused = side.WorkerPart(engine_configuration(), cache_config(9))
    unused.shutdown()
    refused = side.WorkerPart(engine_configuration(), cache_config(8))
    with pytest.raises(ValueError, match=r"the cache of 0 has the shape .*, not 8 blocks"):
        refused.register(grouped(9))
    refused.load(CopyPlan())
    refused.save(CopyPlan())
    assert refused.results(set()).finished_recving in (None, set())
    refused.shutdown()
    scheduler = side.SchedulerPart(decoding(min_tokens=40), cache_config())
    assert scheduler.match(request("a", 400), 0) == (0, False)
    scheduler.shutdown()


@pytest.mark.slow
def test_a_process_of_the_prefill_engine_ends_with_the_decoding_engine() -> None:
    """Its workers end, too. It ends at once if the decoding engine has ended before."""
    child = """
import multiprocessing, os, sys, time
from lvllm.prefill.executors import follow
if __name__ == "__main__":
    follow(int(sys.argv[1]))
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    worker.start()
    nice = [os.getpriority(os.PRIO_PROCESS, process) for process in (0, worker.pid)]
    print(*nice, worker.pid, flush=True)
    input()
"""
    with subprocess.Popen(["sleep", "100"]) as parent:
        command = [sys.executable, "-c", child, str(parent.pid)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout is not None
            priority = os.getpriority(os.PRIO_PROCESS, parent.pid) + executors.NICE
            *nice, worker = (int(field) for field in process.stdout.readline().split())
            assert nice == [priority, priority]
            assert process.poll() is None
            parent.kill()
            assert process.wait(60) == 1
            end = time.monotonic() + 60
            while state_of(worker) not in (None, "Z"):  # Nobody may be there to reap orphans.
                assert time.monotonic() < end
                time.sleep(0.05)
    with subprocess.Popen(command, **pipes) as late:
        assert late.wait(60) == 1


def state_of(process: int) -> str | None:
    """The letter that Linux shows for the state of a process; None if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # The file is gone, or the process while it is read.
        return None


@pytest.mark.parametrize("gpu", [None, 3])
def test_executors_set_up_their_process(gpu: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so before vLLM's own executor starts anything."""
    order: list[Any] = []

    class Upstream:
        def __init__(self, vllm_config: Any) -> None:
            order.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    class Executor(executors._Behind, Upstream):
        pass

    monkeypatch.setattr(executors, "follow", order.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    transfer = connector_config(decoding_process=4711, gpu=gpu)
    Executor(SimpleNamespace(kv_transfer_config=transfer))
    assert order == [4711, "7" if gpu is None else "3"]
