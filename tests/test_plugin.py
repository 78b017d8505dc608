"""The entry point, in this process."""

from types import SimpleNamespace
from typing import Any

import pytest
import vllm.platforms

from lvllm import patches, plugin, prepare
from lvllm.errors import LvllmError
from lvllm.patches import Patch


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVLLM_MOE_NUMA_ENABLED", "1")


@pytest.mark.usefixtures("enabled")
def test_the_layer_is_replaced_however_often_the_plugin_is_loaded() -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    from lvllm.moe.routed_experts import HybridRoutedExperts

    for _ in range(3):
        plugin.register()
    assert op_registry_oot["RoutedExperts"] is HybridRoutedExperts


@pytest.mark.usefixtures("enabled")
def test_a_models_own_expert_class_is_refused_and_not_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless its layer is resident: then it is left to vLLM, as is any other."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from lvllm.moe import resident

    class OwnExperts(RoutedExperts):
        pass

    plugin.register()
    monkeypatch.setattr(resident, "is_resident", lambda prefix: prefix.endswith(".1"))
    monkeypatch.setattr(resident, "_upstream_method", lambda *given: given)
    layer: Any = object.__new__(OwnExperts)
    with pytest.raises(ValueError, match="experts of the class OwnExperts are not"):
        layer._get_quant_method("model.layers.0", None, None)
    parallel = SimpleNamespace(use_ep=False)
    moe = SimpleNamespace(is_act_and_mul=True, moe_parallel_config=parallel, is_lora_enabled=False)
    assert layer._get_quant_method("layers.1", None, moe) == (layer, "layers.1", None, moe)


@pytest.mark.usefixtures("enabled")
def test_a_build_for_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr(vllm.platforms, "current_platform", UnspecifiedPlatform())
    with pytest.raises(LvllmError, match="is not built for CPUs, and finds no GPU here"):
        plugin.register()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("cpu", [True, False])
def test_what_only_the_cpu_platform_lacks(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, vLLM's own linear layers and routers stay, and configurations are checked."""

    checked: list[Any] = []
    completed: list[bool] = []

    class Platform:
        is_cpu = staticmethod(lambda: cpu)
        is_unspecified = staticmethod(lambda: False)

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            checked.append(vllm_config)

    def install(self: Patch) -> None:
        if self.platform == "cpu":
            completed.append(True)
        else:
            upstream_install(self)

    upstream_install = Patch.install
    monkeypatch.setattr(vllm.platforms, "current_platform", Platform())
    monkeypatch.setattr(Patch, "install", install)
    plugin.register()
    assert bool(completed) == cpu
    monkeypatch.setattr(prepare, "prepare", lambda config: checked.append("prepared"))
    Platform.check_and_update_config("config")
    assert checked == ["config", "prepared"]


@pytest.mark.parametrize("value", ["yes", "2", "01"])
def test_a_wrong_switch_ends_the_process(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVLLM_MOE_NUMA_ENABLED", value)
    with pytest.raises(LvllmError, match=f"LVLLM_MOE_NUMA_ENABLED='{value}' is not allowed"):
        plugin.register()


@pytest.mark.usefixtures("enabled")
def test_a_misspelt_variable_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVLLM_GPU_RESIDENT_LAYERS", "0")
    with pytest.raises(LvllmError, match="did you mean LVLLM_GPU_RESIDENT_MOE_LAYERS"):
        plugin.register()


@pytest.mark.parametrize("value", ["", "0"])
def test_switched_off_nothing_is_looked_at(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even settings that would be refused: the program is stock vLLM."""
    monkeypatch.setenv("LVLLM_MOE_NUMA_ENABLED", value)
    monkeypatch.setenv("LK_THREADS", "nonsense")
    plugin.register()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("version", ["0.30.0", "0.34.0", "1.0.0rc1"])
def test_another_vllm_is_refused_before_anything_is_replaced(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(patches, "install", pytest.fail)
    with pytest.raises(LvllmError, match=f"^vLLM {version} is installed, and LvLLM .* to "):
        plugin.register()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("version", ["0.31.0", "0.32.1.dev5+cpu", "0.33.9"])
def test_these_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    plugin.register()
