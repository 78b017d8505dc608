"""A model on two nodes of a Ray cluster, without GPUs: right answers, from experts on lk on both.

Both nodes are on this host, and each takes one rank.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers

from lvllm.evaluation import load_questions
from lvllm.serving import guardian
from lvllm.serving.background import free_port
from tests.e2e.generate import ONE_PROCESS, TINY, Answers, Job, generate
from tests.e2e.server import fail_to_serve

RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120
# How a model is divided, and how many experts and how many rows of each a rank then holds.
MODES: dict[str, tuple[Job, list[int]]] = {
    "tensor": ({"tensor_parallel_size": 2}, [16, 64]),
    "pipeline": ({"pipeline_parallel_size": 2}, [16, 128]),
}
# Two actors, and each has the number of threads that the front process was told.
BOTH = (
    r"(?s)pid=(\d+)\)[^\n]*experts on lk, \w+, 1 threads"
    r".*pid=(?!\1\b)\d+\)[^\n]*experts on lk, \w+, 1 threads"
)


@contextmanager
def node(log: Path, *arguments: str) -> Iterator[None]:
    """A node that takes one rank; the block begins when it is part of the cluster."""
    command = [RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    command += ['--resources={"lvllm": 1}', "--object-store-memory=80000000"]
    command += ["--node-ip-address=127.0.0.1", *arguments]
    # The guardian ends the node even if this process is killed.
    reading, writing = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, guardian.__file__, str(reading), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(reading,),
            start_new_session=True,
        )
    os.close(reading)
    try:
        until = time.monotonic() + START_SECONDS
        while "Ray runtime started." not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        os.close(writing)
        process.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two nodes."""
    logs, port = tmp_path_factory.mktemp("ray"), free_port()
    head = ("--head", f"--port={port}", "--include-dashboard=false")
    client = f"--ray-client-server-port={free_port()}"
    # Ray makes sockets in the folder, whose paths may have no more than 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        node(logs / "head", *head, client, f"--temp-dir={folder}"),
        node(logs / "node", f"--address=127.0.0.1:{port}"),
    ):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def answers(address: str) -> dict[str, Answers]:
    """The answers to the first questions, by mode."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    asked = [
        tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in load_questions()[:4]
    ]
    job: Job = {
        "model": str(TINY),
        "prompts": [list(ids) for ids in asked],
        "max_tokens": 24,
        "held": True,
        "distributed_executor_backend": "ray",
    }
    # Ray copies what actors print, and leaves out what several of them do.
    environment = {"RAY_ADDRESS": address, "RAY_DEDUP_LOGS": "0", "LK_THREADS": "1"}
    jobs = [job | mode for mode, _ in MODES.values()]
    found = generate(jobs, environment=ONE_PROCESS | environment, logged=BOTH)
    return dict(zip(MODES, found, strict=True))


@pytest.mark.parametrize("name", MODES)
def test_both_nodes_compute_right_answers(name: str, answers: dict[str, Answers]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for question, answer in zip(load_questions(), answers[name], strict=False):
        text = tokenizer.decode(answer["tokens"]).partition("<|end|>")[0]
        assert text.split() == question.answer.split()
        assert answer["held"] == [MODES[name][1]] * 2


def test_too_few_nodes_are_refused_in_one_line(address: str) -> None:
    ray = ("--distributed-executor-backend", "ray", "--pipeline-parallel-size", "4")
    code, errors = fail_to_serve("--config", "config.yaml", *ray, RAY_ADDRESS=address)
    assert code == 1
    assert errors.strip().splitlines()[-1] == (
        "lvllm: the model is divided among 4 ranks, and the nodes of the Ray cluster take 2:"
        " `ray start --resources '{\"lvllm\": 1}'` starts a node that takes one (docs/ray.md)"
    )
    assert "Traceback" not in errors
