"""The command that `lvllm serve` becomes."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from lvllm.errors import LvllmError
from lvllm.planning import shape
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import Machine
from lvllm.serving.defaults import LEAST_CONTEXT
from lvllm.serving.launch import Launch, prepare
from lvllm.units import GIB
from tests.models.gguf import write
from tests.planning.made_up import machine

# Experts of 128 x 128 have 2 x 128 and 128 rows, each with a scale of 32 bits.
BY_ROWS = 8 + 32 * 3 * 128 / (3 * 128 * 128)
TINY = str(Path(__file__).parents[2] / "examples/models/tiny-moe")


def here() -> Machine:
    return machine()


def options(launch: Launch) -> dict[str, str]:
    """The options of the command, by name."""
    words = launch.command[launch.command.index("serve") + 1 :]
    return {a: b for a, b in pairwise(words) if a.startswith("--")}


def test_a_model_gets_settings_with_reasons() -> None:
    launch = prepare([TINY, "--port", "81"], {}, here)
    assert launch.command[launch.command.index("serve") + 1 :][:3] == [TINY, "--port", "81"]
    assert options(launch)["--max-model-len"] == "1024"
    assert int(options(launch)["--kv-cache-memory-bytes"]) > 0
    assert launch.environment["LVLLM_MOE_NUMA_ENABLED"] == "1"
    assert "--max-model-len 1024: the model's longest context" in launch.notes
    assert launch.notes[0].startswith("planned for this machine: everything on the CPU; ")


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-num-seqs: 5\nkv_cache_memory_bytes: 1000000\n")
    launch = prepare([TINY, "--max-model-len=512", "--config", str(file)], {}, here)
    assert set(options(launch)) == {
        "--max-model-len=512",
        "--host",
        "--max-num-batched-tokens",
        "--config",
    }
    assert not any("max-num-seqs" in note for note in launch.notes)


def test_the_server_is_for_this_machine_unless_something_else_is_said(tmp_path: Path) -> None:
    assert options(prepare([TINY], {}, here))["--host"] == "127.0.0.1"
    assert options(prepare([TINY, "--host", "0.0.0.0"], {}, here))["--host"] == "0.0.0.0"
    file = tmp_path / "config.yaml"
    file.write_text("host: 0.0.0.0\n")
    assert "--host" not in options(prepare([TINY, "--config", str(file)], {}, here))


def test_a_key_goes_where_other_users_cannot_read_it(tmp_path: Path) -> None:
    launch = prepare([TINY, "--api-key", "sesame", "--port", "81"], {}, here)
    assert launch.environment["VLLM_API_KEY"] == "sesame"
    assert "sesame" not in launch.command
    assert options(launch)["--port"] == "81"
    # The variable takes one key, and a key in the file would win over it.
    launch = prepare([TINY, "--api-key", "one", "two"], {}, here)
    assert "VLLM_API_KEY" not in launch.environment
    file = tmp_path / "config.yaml"
    file.write_text("api-key: other\n")
    launch = prepare([TINY, "--api-key", "sesame", "--config", str(file)], {}, here)
    assert options(launch)["--api-key"] == "sesame"


def test_a_context_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    config = json.loads((Path(TINY) / "config.json").read_text())
    long = config | {"max_position_embeddings": 1 << 24}
    (tmp_path / "config.json").write_text(json.dumps(long))
    for here, on_gpu in ((machine(gib=8), False), (machine(gib=64, gpus=1, gpu_gib=3), True)):
        model = shape.of_folder(tmp_path, "x")
        launch = prepare([str(tmp_path)], {}, lambda here=here: here)  # type: ignore[misc]
        context = int(options(launch)["--max-model-len"])
        memory = here.gpu.memory_bytes if here.gpu else here.memory_bytes
        assert LEAST_CONTEXT <= context < 1 << 24
        assert model.cache_bytes(context) < memory < 4 * model.cache_bytes(2 * context)
        assert ("--kv-cache-memory-bytes" in options(launch)) == (not on_gpu)


def test_the_size_of_the_cache_may_be_in_vllms_variable() -> None:
    launch = prepare([TINY], {"VLLM_CPU_KVCACHE_SPACE": "4"}, here)
    assert "--kv-cache-memory-bytes" not in options(launch)


@pytest.mark.parametrize(
    ("use", "bits", "format"),
    [
        ("INT4", 4.5, "int4"),
        ("INT8", BY_ROWS, "int8"),
        ("FP8", BY_ROWS, "fp8"),
        ("TO_DTYPE", 16, "bf16"),
        ("KEEP", 16, "bf16"),
        ('[{"layers.0": "KEEP"}, {".*": "INT4"}]', 16, "bf16"),
    ],
)
def test_the_plan_has_the_experts_as_they_are_in_memory(use: str, bits: float, format: str) -> None:
    plan = prepare([TINY], {"LVLLM_MOE_USE_WEIGHT": use}, here).plan
    assert plan is not None
    assert plan.best is not None
    assert plan.best.how.expert_bits(plan.model) == pytest.approx(bits)
    (part,) = plan.best.how.expert_parts(plan.model)
    assert part.format == format
    assert not any(one.key.endswith("moe_use_weight") for one in plan.settings)


def test_the_plan_has_what_was_given_for_gpus() -> None:
    environ = {"LVLLM_GPU_RESIDENT_MOE_LAYERS": "0-1", "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE": "777"}
    plan = prepare([TINY], environ, lambda: machine(gpus=1)).plan
    assert plan is not None
    assert plan.best is not None
    assert (plan.best.how.resident, plan.best.how.streamed_from) == (2, 777)


def test_a_gguf_file_is_planned(tmp_path: Path) -> None:
    file = write(Path(TINY), tmp_path / "model.gguf", lambda name: Type.F32)
    for model in (file, tmp_path):
        launch = prepare([str(model), "--port", "81"], {}, here, experts_per_token=2)
        assert launch.command[launch.command.index("serve") + 1 :][:3] == [
            str(model),
            "--port",
            "81",
        ]
        assert options(launch)["--hf-overrides"] == '{"num_experts_per_tok": 2}'
        assert launch.plan is not None
        assert "--kv-cache-memory-bytes" in options(launch)
    with pytest.raises(PlanError, match=r"x\.gguf: no such file$"):
        prepare([str(tmp_path / "x.gguf")], {}, here)


def test_what_fits_on_the_gpus_is_there_as_a_whole() -> None:
    chosen = prepare([TINY], {}, lambda: machine(gpus=2))
    assert "LVLLM_GPU_RESIDENT_MOE_LAYERS" in chosen.environment
    assert "LVLLM_GPU_EXPERT_CACHE" not in chosen.environment
    assert options(chosen)["--tensor-parallel-size"] == "2"


def test_a_cache_of_experts_is_passed_on(tmp_path: Path) -> None:
    """This model has 9 GiB of experts, and the card has room for some of them."""
    config = json.loads((Path(TINY) / "config.json").read_text())
    config |= {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 24}
    config |= {"num_experts": 128, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def small_card() -> Machine:
        return machine(gpus=1, gpu_gib=6, gb_per_s=50)

    launch = prepare([str(tmp_path)], {}, small_card)
    size = float(launch.environment["LVLLM_GPU_EXPERT_CACHE"])
    assert 0 < size < 6
    assert "LVLLM_GPU_RESIDENT_MOE_LAYERS" not in launch.environment
    assert any(
        note.startswith(f"LVLLM_GPU_EXPERT_CACHE={size:g}: GiB of each GPU for the ")
        for note in launch.notes
    )
    # What the user gives is in the environment already, and is not chosen once more.
    for value in ("0", "0.3", "auto"):
        own = prepare([str(tmp_path)], {"LVLLM_GPU_EXPERT_CACHE": value}, small_card)
        assert own.environment["LVLLM_GPU_EXPERT_CACHE"] == value
        assert not any(note.startswith("LVLLM_GPU_EXPERT_CACHE=") for note in own.notes)
        assert own.plan is not None
        assert own.plan.best is not None
        cache = own.plan.best.how.cache
        assert cache > 0 if value == "auto" else cache == pytest.approx(float(value) * GIB)
        assert ("LVLLM_GPU_RESIDENT_MOE_LAYERS" in own.environment) == (value != "auto")


def test_the_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = prepare(["--port", "81"], {}, here)
    model = launch.command[launch.command.index("serve") + 1]
    assert Path(model).resolve() == Path(TINY).resolve()
    assert launch.notes[0].startswith("no model was named: this is the demo model")
    assert options(launch)["--compilation-config.mode"] == "NONE"


def test_threads_by_the_name_of_fastllm() -> None:
    assert prepare([TINY], {"FT_THREADS": "2"}, here).environment["LK_THREADS"] == "2"
    both = prepare([TINY], {"FT_THREADS": "2", "LK_THREADS": "1"}, here)
    assert both.environment["LK_THREADS"] == "1"


def test_without_a_plan_the_server_starts_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "not_known_yet"}')
    launch = prepare([str(tmp_path)], {}, here)
    assert options(launch) == {"--host": "127.0.0.1"}
    assert launch.notes[0].startswith("no plan, so vLLM's own defaults hold: ")

    def broken() -> Machine:
        raise PlanError("the engine does not start")

    assert options(prepare([TINY], {}, broken)) == {"--host": "127.0.0.1"}


def test_a_model_that_may_not_fit_is_tried() -> None:
    launch = prepare([TINY], {}, lambda: machine(gib=0.5))
    assert launch.notes[0].startswith(
        "the model may not fit, so vLLM's own defaults hold: the host"
    )
    assert options(launch) == {"--host": "127.0.0.1"}


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        (["/no/such/folder"], {}, "/no/such/folder: no such folder"),
        ([TINY], {"LVLLM_MOE_NUMA_ENABLED": "0"}, "LVLLM_MOE_NUMA_ENABLED='0' with `lvllm serve`"),
        ([TINY], {"LK_THREADS": "many"}, "LK_THREADS='many'"),
        ([TINY], {"FT_THREADS": "many"}, "LK_THREADS='many'"),
        ([TINY, "--config", "/no/file"], {}, "--config /no/file: No such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    words: list[str], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(LvllmError) as error:
        prepare(words, environ, here)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
