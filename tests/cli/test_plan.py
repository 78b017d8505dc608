"""`lvllm plan` as its user runs it."""

import json
from pathlib import Path

import pytest
import yaml
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner, Result

from lvllm.cli.app import app
from lvllm.planning import source
from tests.planning.gguf_files import small
from tests.planning.test_measured import report

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "examples/models/tiny-moe")
SMALL = ["--context", "512", "--prompt", "128", "--answer", "64"]
SERVER = ["--ram", "24G", "--cores", "2", "--bandwidth", "28", "--isa", "avx2"]


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def refusal(result: Result) -> str:
    """The line that a command ended with."""
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    message = str(result.exception.code)
    assert message.startswith("lvllm: ")
    assert "\n" not in message
    return message


def max_model_len(result: Result) -> int:
    """That of the configuration that a plan prints."""
    text = result.output.split("config.yaml\n\n", 1)[1].split("\n\n", 1)[0]
    return int(yaml.safe_load(text)["max-model-len"])


def test_a_described_machine() -> None:
    result = plan(TINY, *SMALL, *SERVER)
    assert result.exit_code == 0, result.output
    assert "everything on the CPU" in result.output
    assert max_model_len(result) == 512


@pytest.mark.parametrize(
    ("arguments", "context"), [([], 1024), (["--context", "300"], 300), (["--prompt", "900"], 1024)]
)
def test_what_is_not_given_fits_a_short_context(arguments: list[str], context: int) -> None:
    """The model was made for 1024 tokens, and a prompt has 2048 by default."""
    result = plan(TINY, *arguments, *SERVER)
    assert result.exit_code == 0, result.output
    assert max_model_len(result) == context


def test_this_machine_is_measured() -> None:
    result = plan(TINY, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fits"]
    assert found["machine"]["read_gb_per_s"] > 0
    best = found["candidates"][0]
    assert best["lacks"] is None
    assert best["decode_tokens_per_s"] == pytest.approx(1 / sum(best["decode_seconds"].values()))
    assert best["prefill_tokens_per_s"] == pytest.approx(
        128 / sum(best["prefill_seconds"].values())
    )


def test_a_machine_of_which_there_is_a_report(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    file.write_text(report().model_dump_json())
    result = plan(TINY, *SMALL, "--machine", str(file), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["machine"]["cores"] == 12
    file.write_text('{"cpu": 7}')
    refused = plan(TINY, *SMALL, "--machine", str(file))
    said = "not what `lvllm doctor --json` prints"
    assert refusal(refused) == f"lvllm: --machine {file}: {said}"


def test_too_little_memory_is_no_success() -> None:
    result = plan(TINY, *SMALL, *SERVER, "--ram", "1G")
    assert result.exit_code == 1
    assert "The model does not fit on this machine." in result.output


def test_without_a_way_to_use_the_gpu_it_needs_the_build_for_cpus() -> None:
    small = ["--gpu", "rtx-3060", "--gpu-memory", "1G"]
    result = plan(TINY, *SMALL, *SERVER, *small)
    assert result.exit_code == 0, result.output
    assert "no: each GPU would hold" in result.output
    assert result.output.endswith("This needs LvLLM's build for CPUs: docs/install.md.\n")


def test_a_cache_of_experts_is_shown(tmp_path: Path) -> None:
    """The model has 9 GiB of experts, and the card some room for them."""
    config = json.loads((Path(TINY) / "config.json").read_text())
    config |= {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 24}
    config |= {"num_experts": 128, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = ["--gpu", "rtx-4090", "--gpu-memory", "6G"]
    shown = plan(str(tmp_path), *SMALL, *SERVER, *card)
    assert shown.exit_code == 0, shown.output
    best = json.loads(plan(str(tmp_path), *SMALL, *SERVER, *card, "--json").stdout)["candidates"][0]
    cache = best["expert_cache"]
    assert 0 < cache["experts"] < cache["of"] == 24 * 128
    assert cache["experts"] / cache["of"] < cache["saved"] < 1
    slots = cache["experts"] * 2 * 3 * 1024 * 512
    assert slots <= cache["bytes_per_gpu"] < best["gpu_memory"]["cached experts"]
    assert f"{best['name']} " in shown.output
    assert f"{cache['experts']} of 3072, which are taken to save " in shown.output
    settings = yaml.safe_load(best["yaml"])
    size = settings["additional_config.lvllm.gpu_expert_cache"]
    assert size * (1 << 30) == pytest.approx(cache["bytes_per_gpu"])
    assert f"LVLLM_GPU_EXPERT_CACHE={size} " in shown.output
    assert "LVLLM_DEFER_EXPERTS" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/folder"], "/no/such/folder: no such folder, and no id on the hub"),
        (["no-such-folder"], "no-such-folder: no such folder, and no id on the hub"),
        ([str(REPOSITORY)], f"{REPOSITORY}: the folder has no config.json"),
        ([f"{TINY}/config.json"], "config.json: a file; a folder with config.json"),
        (["no/such.gguf"], "no/such.gguf: no such file"),
        ([TINY, "--prompt", "1000", "--answer", "30"], "--prompt and --answer: 1030 tokens; "),
        ([TINY, "--context", "4096"], "--context: 4096 tokens; "),
        (
            [TINY, "--context", "100", "--prompt", "100"],
            "--context 100: --prompt and --answer are 101 tokens",
        ),
        ([TINY, *SMALL, "--machine", "/no/file"], "--machine /no/file: No such file or directory"),
        ([TINY, *SMALL, "--isa", "neon"], "--isa neon: allowed are"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    assert said in refusal(plan(*arguments))


def test_a_gguf_file_that_is_planned_and_not_served(tmp_path: Path) -> None:
    file = small(tmp_path / "model.gguf", Type.TQ1_0)
    for model in (file, tmp_path):
        result = plan(str(model), *SMALL, *SERVER)
        assert result.exit_code == 0, result.output
        assert "experts in TQ1_0, 1.69 bits a weight" in result.output
        assert "LvLLM does not serve experts in TQ1_0: the plan is for the same" in result.output
        assert "experts in int4 of 4.50 bits a weight" in result.output
        assert "vllm serve" not in result.output
        settings = yaml.safe_load(result.output.partition("; a GGUF file has no command")[2])
        assert settings["max-model-len"] == 512
        assert "model" not in settings
        found = json.loads(plan(str(model), *SMALL, *SERVER, "--json").stdout)
        assert found["model"]["gguf"] == {
            "types": ["TQ1_0"],
            "bits": 1.6875,
            "architecture": "qwen3moe",
        }
        assert "does not serve experts in TQ1_0" in found["model"]["unserved"]
        assert {one["command"] for one in found["candidates"]} == {None}
        assert "model" not in yaml.safe_load(found["candidates"][0]["yaml"])
    served = json.loads(plan(TINY, *SMALL, *SERVER, "--json").stdout)
    assert served["model"]["gguf"] is served["model"]["unserved"] is None
    assert "vllm serve" in served["candidates"][0]["command"]


def test_a_gguf_file_that_is_served(tmp_path: Path) -> None:
    file = small(tmp_path / "model.gguf", Type.Q8_0)
    result = plan(str(file), *SMALL, *SERVER)
    assert result.exit_code == 0, result.output
    assert "experts in Q8_0, 8.50 bits a weight" in result.output
    assert "does not serve" not in result.output
    assert f"vllm serve {file} --" in result.output
    found = json.loads(plan(str(file), *SMALL, *SERVER, "--json").stdout)["model"]
    assert found["unserved"] is None
    assert (found["experts_format"], found["expert_bits"], found["other_bits"] // 1) == (
        "int8",
        8.5,
        16,
    )


def test_a_file_of_another_name_is_known_by_its_begin(tmp_path: Path) -> None:
    file = small(tmp_path / "sha256-0123")
    assert plan(str(file), *SMALL, *SERVER).exit_code == 0


def test_which_model_of_a_folder(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002", "a-00002-of-00002", "mmproj-a"):
        small(tmp_path / f"{name}.gguf")
    first = tmp_path / "a-00001-of-00002.gguf"
    assert source.gguf_of(str(tmp_path)) == first
    small(tmp_path / "b.gguf")
    said = f"{tmp_path}: the folder has 2 models; name one: {first.name}, b.gguf"
    assert said in refusal(plan(str(tmp_path)))
    # With other weights, a folder is what it always was.
    (tmp_path / "config.json").write_text((Path(TINY) / "config.json").read_text())
    (tmp_path / "model.safetensors").touch()
    assert source.gguf_of(str(tmp_path)) is None
    assert source.folder_of(str(tmp_path)) == tmp_path


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(plan("nobody/no-model"))
    assert message.startswith(
        "lvllm: no folder is called so, and nobody/no-model: the Hugging Face hub did"
    )


@pytest.mark.parametrize("size", ["", "G", "0G", "-1G", "12", "1.5.1G", "1e3G", "12P", "nanG"])
def test_sizes(size: str) -> None:
    result = plan(TINY, "--ram", size)
    assert result.exit_code == 2
    assert "is no size such as 24G" in " ".join(result.output.replace("│", " ").split())
