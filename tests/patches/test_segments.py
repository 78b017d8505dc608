"""vLLM's shared memory has no name once everyone is attached, so that no kill leaves any behind."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from lvllm.patches import segments


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin may have been loaded by another test, or not."""
    monkeypatch.setattr(MessageQueue, "wait_until_ready", MessageQueue.wait_until_ready)
    monkeypatch.setattr(_CPUSHMDistributed, "_init_cpu_shm", _CPUSHMDistributed._init_cpu_shm)


def test_a_queue_works_without_its_name() -> None:
    segments.remove_queue_name.install()
    segments.remove_queue_name.install()  # plugins are loaded more than once
    writer = MessageQueue(1, 1, max_chunk_bytes=1 << 16, max_chunks=2)
    file = segments.FOLDER / writer.buffer.shared_memory.name
    assert file.exists()
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    waiting = threading.Thread(target=reader.wait_until_ready)
    waiting.start()
    writer.wait_until_ready()
    waiting.join()
    assert not file.exists()
    for message in ("one", "two", "three"):
        writer.enqueue(message)
        assert reader.dequeue(timeout=10) == message


def test_a_group_of_ranks_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(group_name="vllm_dist_1-tp:0-[0-1]-cpushm")

    def join(self: object) -> int:
        for name in (f"{group.group_name}_0", f"{group.group_name}_1", "another"):
            (tmp_path / name).touch()
        return 7

    monkeypatch.setattr(_CPUSHMDistributed, "_init_cpu_shm", join)
    monkeypatch.setattr(segments, "FOLDER", tmp_path)
    segments.remove_group_names.install()
    assert _CPUSHMDistributed._init_cpu_shm(group) == 7  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["another"]
