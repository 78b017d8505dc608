"""`lvllm download`, from a hub on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.fake_hub import COMMIT, NAME, FakeHub, serving

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"
COMMAND = "import sys; sys.argv[0] = 'lvllm'; from lvllm.cli import main; main()"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {
        "config.json": (TINY / "config.json").read_bytes(),
        "model.safetensors": b"weights" * 1000,
        "pytorch_model.bin": b"the same weights",
        "original/weights.pth": b"the same weights",
        "README.md": b"# A model",
    }
    with serving(FakeHub(files)) as hub:
        yield hub


def download(
    hub: str, home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "download", *arguments],
        env=os.environ | settings | {"HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_weights_come_in_one_form_and_once(hub: FakeHub, tmp_path: Path) -> None:
    result = download(hub.url, tmp_path, NAME)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.name == COMMIT
    wanted = {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert "lvllm: 3 files, 0 MiB; the disk has" in result.stderr
    assert "lvllm: it fits here: everything on the CPU" in result.stderr
    assert sorted(hub.fetched) == sorted(wanted)
    hub.fetched.clear()
    assert download(hub.url, tmp_path, NAME).returncode == 0
    assert hub.fetched == []


def test_patterns_and_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    to = tmp_path / "here"
    result = download(
        hub.url, tmp_path, NAME, "--to", str(to), "--include", "*.md", "--include", "*.bin"
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in to.iterdir() if path.is_file()} == {
        "README.md",
        "pytorch_model.bin",
    }
    none = download(hub.url, tmp_path, NAME, "--include", "*.txt")
    assert none.returncode == 1
    assert none.stderr.strip() == f"lvllm: {NAME}: none of its 5 files is chosen by the patterns"


def test_a_model_that_does_not_fit_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"moe_intermediate_size": 10**9}).encode()
    result = download(hub.url, tmp_path, NAME)
    assert result.returncode == 1
    assert f"lvllm: {NAME} does not fit here: the host would hold" in result.stderr
    assert "model.safetensors" not in hub.fetched
    assert download(hub.url, tmp_path, NAME, "--force").returncode == 0
    assert "model.safetensors" in hub.fetched


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["owner/other"], "lvllm: owner/other: the Hugging Face hub did not answer as it should: "),
        (["a b/c"], "lvllm: a b/c: the Hugging Face hub did not answer as it should: "),
        ([NAME, "--source", "ftp"], "lvllm: --source ftp: allowed are hf and modelscope"),
        ([NAME, "--source", "modelscope"], f"lvllm: {NAME}: modelscope is not installed: pip "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], said: str, hub: FakeHub, tmp_path: Path
) -> None:
    result = download(hub.url, tmp_path, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    result = download("http://127.0.0.1:9", tmp_path, NAME)
    assert result.returncode == 1
    assert result.stderr.startswith(f"lvllm: {NAME}: the Hugging Face hub did not answer")
    assert result.stderr.count("\n") == 1
