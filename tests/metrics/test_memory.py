"""The memory of the counts: between processes, private, and gone with its processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvllm.metrics import memory
from lvllm.metrics.memory import Reader, Series, open_block, prepare

SERIES = [Series("lvllm_nan_stops_total", {}, [0])]

WRITER = """
import sys
from lvllm.metrics.memory import Series, open_block
numbers = open_block({"engine": sys.argv[1]}, [Series("lvllm_nan_stops_total", {}, [2])], 3)
numbers[2] += int(sys.argv[2])
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(memory._VARIABLE, "")
    prepare()
    yield
    memory.close()


def write(engine: str, value: int) -> subprocess.Popen[str]:
    """Another process that counts, and stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, engine, str(value)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_processes_count_beside_each_other() -> None:
    reader = Reader()
    assert reader.read() == []
    writers = [write("1", 7), write("2", 9)]
    mine = open_block({"engine": "0"}, SERIES, 1)
    assert mine is not None
    mine[0] = 5
    found = {block.labels["engine"]: numbers.tolist() for block, numbers in reader.read()}
    assert found == {"0": [5], "1": [0, 0, 7], "2": [0, 0, 9]}
    mine[0] += 1
    writers[0].kill()  # what a process counted stays after its end
    writers[0].wait()
    found = {block.labels["engine"]: numbers.tolist() for block, numbers in reader.read()}
    assert found == {"0": [6], "1": [0, 0, 7], "2": [0, 0, 9]}
    assert all(block.series[0].sample == "lvllm_nan_stops_total" for block, _ in reader.read())
    writers[1].kill()
    writers[1].wait()


def test_a_large_block_and_one_after_it() -> None:
    large = open_block({}, SERIES, 100_001)
    small = open_block({"engine": "x"}, SERIES, 2)
    assert large is not None
    assert small is not None
    large[:], small[:] = 3, 4
    (_, first), (block, second) = Reader().read()
    assert first.tolist() == [3] * 100_001
    assert second.tolist() == [4, 4]
    assert block.labels == {"engine": "x"}


def test_it_has_no_name_and_is_private() -> None:
    process, _, descriptor = os.environ[memory._VARIABLE].partition(":")
    file = Path(f"/proc/{process}/fd/{descriptor}")
    assert os.readlink(file) == "/memfd:lvllm-metrics (deleted)"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o500  # only this user looks through /proc


def test_a_killed_front_process_leaves_nothing() -> None:
    """Its workers count on, harmlessly, and a reader gets an error and not old counts."""
    front = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, time; from lvllm.metrics import memory; memory.prepare();"
            "memory.open_block({}, [], 1); print(os.environ[memory._VARIABLE], flush=True);"
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert front.stdout is not None
    os.environ[memory._VARIABLE] = front.stdout.readline().strip()
    numbers = open_block({}, SERIES, 1)
    assert numbers is not None
    reader = Reader()
    assert len(reader.read()) == 2
    front.send_signal(signal.SIGKILL)
    front.wait()
    numbers[0] += 1
    with pytest.raises(OSError):
        reader.read()
    assert open_block({}, SERIES, 1) is None


def test_a_later_model_of_the_process_begins_anew() -> None:
    first, reader = open_block({}, SERIES, 1), Reader()
    assert first is not None
    first[0] = 3
    assert len(reader.read()) == 1
    prepare()
    assert reader.read() == []
    first[0] += 1  # the earlier model's layers may still be there
    second = open_block({}, SERIES, 1)
    assert second is not None
    assert [numbers.tolist() for _, numbers in reader.read()] == [[0]]


def test_a_block_that_is_being_added_is_not_read() -> None:
    assert open_block({}, SERIES, 1) is not None
    assert memory._made is not None
    os.ftruncate(memory._made, os.fstat(memory._made).st_size + 4096)
    assert len(Reader().read()) == 1


def test_without_memory_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> int:
        raise PermissionError(13, "no memory files here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    warnings: list[str] = []
    monkeypatch.setattr(memory.logger, "warning", lambda text, *more: warnings.append(text % more))
    prepare()
    assert open_block({}, SERIES, 1) is None
    assert Reader().read() == []
    assert warnings == ["LvLLM: there will be no metrics: [Errno 13] no memory files here"]


def test_blocks_of_many_processes_at_once() -> None:
    """They are added one after the other: none overlaps another."""
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            for size in range(1, 40):
                numbers = open_block({"engine": str(size)}, [], 100 * size)
                assert numbers is not None
                numbers[:] = size
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = Reader().read()
    assert len(found) == 4 * 39
    for block, numbers in found:
        size = int(block.labels["engine"])
        assert numbers.tolist() == [size] * (100 * size)
