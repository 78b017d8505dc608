"""Checks of the settings of GPU offload, with made-up models and platforms."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.platforms

from lvllm.settings import gpu_checks
from lvllm.settings.resolving import resolve
from lvllm.settings.variables import SettingError

Fields = dict[str, Any]
CUDA_DEFAULTS: Fields = {
    "enable_dbo": False,
    "ubatch_size": 0,
    "all2all_backend": "allgather_reducescatter",
    "prefill_context_parallel_size": 1,
    "data_parallel_backend": "mp",
    "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False,
}


def config(
    layers: int = 8,
    first_dense: int = 3,
    *,
    experts: int = 16,
    drafts: int | None = None,
    offload: tuple[float, int] = (0, 0),
    sleep: bool = False,
    **parallel: Any,
) -> SimpleNamespace:
    """The parts of a VllmConfig that are checked. The first `first_dense` layers are dense."""
    text = SimpleNamespace(num_hidden_layers=layers, first_k_dense_replace=first_dense)
    speculative = None
    if drafts is not None:
        draft = SimpleNamespace(hf_config=SimpleNamespace(n_predict=drafts))
        speculative = SimpleNamespace(method="mtp", draft_model_config=draft)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="M",
            hf_text_config=text,
            get_num_experts=lambda: experts,
            enable_sleep_mode=sleep,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=256),
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**CUDA_DEFAULTS | parallel),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=offload[0]),
            prefetch=SimpleNamespace(offload_group_size=offload[1]),
        ),
    )


def check(
    accelerator: gpu_checks.Accelerator, model: Any, section: Any = None, **given: str
) -> None:
    environ = {f"LVLLM_GPU_{name.upper()}": value for name, value in given.items()}
    gpu_checks.check(resolve(environ, section), accelerator, model)


def refusal(call: Callable[..., object], /, *arguments: Any, **named: Any) -> str:
    with pytest.raises(SettingError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_allowed_settings() -> None:
    check("none", config())
    check("host", config(), resident_moe_layers="3-5,7")
    check("cuda", config(), resident_moe_layers="3-7")
    check("cuda", config(), prefill_min_batch_size="256", prefetch_window="2")
    check("cuda", config(), prefill_min_batch_size="1", staging_mib="64")
    check("cuda", config(), prefill_min_batch_size="auto", call="mailbox")
    check("cuda", config(), expert_cache="4.5")
    check("cuda", config(), expert_cache="4.5", resident_moe_layers="3-6")
    check("cuda", config(), expert_cache="0", resident_moe_layers="3-7")
    check("host", config(), {"gpu_prefill_min_batch_size": "auto"}, prefetch_window="1")
    check("cuda", config(experts=0))
    check("host", config(drafts=2), resident_moe_layers="3,8-9")


@pytest.mark.parametrize("accelerator", ["none", "host", "cuda"])
@pytest.mark.parametrize(
    ("model", "layers", "reason"),
    [
        (config(), "2-4", "layer 2 of M has no routed experts; those that have are 3-7"),
        (config(), "8", "layer 8 of M has no routed experts; those that have are 3-7"),
        (config(drafts=1), "7-9", "layer 9 of M has no routed experts; those that have are 3-8"),
        (config(experts=0), "0", "layer 0 of M has no routed experts; those that have are none"),
    ],
)
def test_resident_layers_without_experts_are_refused(
    accelerator: Any, model: Any, layers: str, reason: str
) -> None:
    said = refusal(check, accelerator, model, resident_moe_layers=layers)
    assert said == f"LVLLM_GPU_RESIDENT_MOE_LAYERS={layers!r}: {reason}"


@pytest.mark.parametrize(
    ("accelerator", "model", "given", "said"),
    [
        ("none", config(), {"resident_moe_layers": "3"}, "ACCELERATOR is none; allowed is empty"),
        ("none", config(), {"prefetch_window": "1"}, "ACCELERATOR is none; allowed is 0 or empty"),
        ("none", config(), {"prefill_min_batch_size": "9"}, "none; allowed is 0 or empty"),
        ("none", config(), {"prefill_min_batch_size": "auto"}, "none; allowed is 0 or empty"),
        ("none", config(), {"call": "auto"}, "is none; allowed is hostfunc or empty"),
        ("none", config(), {"expert_cache": "auto"}, "is none; allowed is 0 or empty"),
        ("cuda", config(experts=0), {"expert_cache": "0.1"}, "experts; allowed is 0 or empty"),
        (
            "cuda",
            config(),
            {"expert_cache": "4", "resident_moe_layers": "3-7"},
            "not resident, and LVLLM_GPU_RESIDENT_MOE_LAYERS names all; allowed is 0 or empty",
        ),
        ("cuda", config(), {"prefill_min_batch_size": "257"}, "; allowed is 0 to 256"),
        (
            "host",
            config(),
            {"prefetch_window": "1"},
            "batches of LVLLM_GPU_PREFILL_MIN_BATCH_SIZE tokens or more, which is 0; allowed is 0",
        ),
        (
            "cuda",
            config(),
            {"staging_mib": "1024"},
            "batches of LVLLM_GPU_PREFILL_MIN_BATCH_SIZE tokens or more, which is 0; allowed is em",
        ),
        (
            "cuda",
            config(experts=0),
            {"prefill_min_batch_size": "auto"},
            "M has no routed experts; allowed is 0 or empty",
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(
    accelerator: Any, model: Any, given: Any, said: str
) -> None:
    assert said in refusal(check, accelerator, model, **given)


def test_caches_for_ranks_and_beside_a_kv_cache() -> None:
    def cache(value: str, ranks: int, kv_cache: int | None) -> None:
        setting = resolve({"LVLLM_GPU_EXPERT_CACHE": value}, None)["gpu_expert_cache"]
        sizes = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_cache))
        gpu_checks.check_cache(setting, ranks, sizes)

    for value, ranks, kv_cache in (("auto", 3, None), ("0,4.5,auto", 3, None), ("2", 2, 1 << 30)):
        cache(value, ranks, kv_cache)
    assert "it has 2 sizes; allowed is one for all GPUs, or one for each of the 3 ranks" in (
        refusal(cache, "1,2", 3, None)
    )
    assert "the size of the KV cache is set, so vLLM measures no memory" in (
        refusal(cache, "auto", 1, 1 << 30)
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("enable-dbo=True", {"enable_dbo": True}),
        ("ubatch-size=2", {"ubatch_size": 2}),
        ("all2all-backend='deepep_v2'", {"all2all_backend": "deepep_v2"}),
        ("prefill-context-parallel-size=2", {"prefill_context_parallel_size": 2}),
        ("data-parallel-backend='ray'", {"data_parallel_backend": "ray"}),
        ("data-parallel-external-lb=True", {"data_parallel_external_lb": True}),
        ("data-parallel-hybrid-lb=True", {"data_parallel_hybrid_lb": True}),
        ("cpu-offload-gb=1.5", {"offload": (1.5, 0)}),
        ("offload-group-size=4", {"offload": (0, 4)}),
        ("enable-sleep-mode=True", {"sleep": True}),
    ],
)
def test_features_that_do_not_work_with_experts_on_the_cpu(name: str, fields: Fields) -> None:
    said = refusal(check, "cuda", config(**fields))
    assert said.startswith(f"{name} is not allowed with LVLLM_MOE_NUMA_ENABLED=1 on vLLM's CUDA")
    assert "; allowed is " in said
    check("host", config(**fields))
    check("cuda", config(experts=0, **fields))


def test_yaml_cannot_set_openmp_threads_on_the_cuda_platform() -> None:
    section = {"omp_num_threads": 2}
    said = refusal(check, "cuda", config(), section, resident_moe_layers="3-7")
    assert said.startswith("additional_config.lvllm.omp_num_threads=2: on vLLM's CUDA platform")
    check("host", config(), section)


@pytest.mark.parametrize(
    ("platform", "value", "chosen"),
    [
        ("cpu", "", "none"),
        ("cpu", "none", "none"),
        ("cpu", "host", "host"),
        ("cpu", "cuda", "on vLLM's CPU platform allowed is none or host"),
        ("cuda", "", "cuda"),
        ("cuda", "cuda", "cuda"),
        ("cuda", "none", "on vLLM's CUDA platform allowed is cuda"),
        ("cuda", "host", "on vLLM's CUDA platform allowed is cuda"),
        ("xpu", "", "on xpu: it is for vLLM's CPU and CUDA platforms"),
        ("xpu", "cuda", "on xpu: it is for vLLM's CPU and CUDA platforms"),
    ],
)
def test_accelerators_of_platforms(
    platform: str, value: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(
        device_name=platform, is_cpu=lambda: platform == "cpu", is_cuda=lambda: platform == "cuda"
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", fake)
    setting = resolve({"LVLLM_ACCELERATOR": value}, None)["accelerator"]
    if chosen in ("none", "host", "cuda"):
        assert gpu_checks.accelerator(setting) == chosen
    else:
        assert chosen in refusal(gpu_checks.accelerator, setting)
