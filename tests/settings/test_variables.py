"""Parsing of single settings, and the page that is generated from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.engine import ISAS
from lvllm.settings import variables
from lvllm.units import ranges

LAYERS = variables.BY_KEY["gpu_resident_moe_layers"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", (0,)), ("0-1", (0, 1)), ("0,9", (0, 9)), ("0,1,8-9", (0, 1, 8, 9)), ("", ()), (" ", ())],
)
def test_layer_lists(text: str, layers: tuple[int, ...]) -> None:
    assert variables.parse(LAYERS, text, LAYERS.name) == layers


def test_sizes_of_the_cache() -> None:
    cache = variables.BY_KEY["gpu_expert_cache"]
    for text, sizes in (
        ("4", (4 << 30,)),
        ("0.5,auto,12", (1 << 29, "auto", 12 << 30)),
        ("0", (0,)),
    ):
        assert variables.parse(cache, text, cache.name) == sizes
    for text in ("4,", ",", "1 GiB", "1e3", ".5", "5.", "inf", "4;5", "1234567", "-0"):
        with pytest.raises(variables.SettingError, match=r"LVLLM_GPU_EXPERT_CACHE=.*number of Gi"):
            variables.parse(cache, text, cache.name)


@pytest.mark.parametrize("text", ["0-", "9-3", "-1", "abc", "1,,2", "1;2", "0x1", "1.5", "-", ","])
def test_bad_layer_lists_name_variable_and_value(text: str) -> None:
    with pytest.raises(variables.SettingError) as caught:
        variables.parse(LAYERS, text, LAYERS.name)
    message = str(caught.value)
    assert message.startswith(f"LVLLM_GPU_RESIDENT_MOE_LAYERS={text!r} is not allowed: ")
    assert "0,1,8-9" in message
    assert "\n" not in message


@given(st.sets(st.integers(0, 200), min_size=1))
def test_describe_is_the_inverse_of_parse(layers: set[int]) -> None:
    ordered = tuple(sorted(layers))
    assert variables.parse(LAYERS, ranges(list(ordered)), LAYERS.name) == ordered


@pytest.mark.parametrize("variable", variables.VARIABLES, ids=lambda v: v.name)
def test_unset_and_empty_mean_the_default(variable: variables.Variable) -> None:
    assert variables.parse(variable, None, variable.name) == variable.default
    assert variables.parse(variable, "  ", variable.name) == variable.default


@pytest.mark.parametrize("variable", variables.VARIABLES, ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["abc", "-1", "0-", "1e3", "٣"])
def test_every_variable_refuses_nonsense(variable: variables.Variable, text: str) -> None:
    with pytest.raises(variables.SettingError, match=variable.name):
        variables.parse(variable, text, variable.name)


def test_zero_switches_prefill_off_but_is_no_thread_count() -> None:
    assert variables.parse(variables.BY_KEY["gpu_prefill_min_batch_size"], "0", "x") == 0
    assert variables.parse(variables.BY_KEY["gpu_prefill_min_batch_size"], " auto ", "x") == "auto"
    with pytest.raises(
        variables.SettingError, match="LK_THREADS='0' is not allowed: a whole number"
    ):
        variables.parse(variables.BY_KEY["lk_threads"], "0", "LK_THREADS")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lk_isa", ISAS),
        ("lk_activation_bits", ("auto", "8", "16")),
    ],
)
def test_choices_are_the_ones_allowed(key: str, values: tuple[str, ...]) -> None:
    variable = variables.BY_KEY[key]
    assert [variables.parse(variable, value, key) for value in values] == list(values)
    assert variable.kind.allowed.replace(" or ", ", ").split(", ") == list(values)
    assert key in variables.ENVIRONMENT_ONLY


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("LVLLM_GPU_PREFTCH_WINDOW", "LVLLM_GPU_PREFETCH_WINDOW"), ("LK_THREDS", "LK_THREADS")],
)
def test_a_misspelt_variable_is_not_ignored(name: str, suggestion: str) -> None:
    with pytest.raises(variables.SettingError, match=f"{name} is not a setting.*mean {suggestion}"):
        variables.check_names({"PATH": "", name: "1"})


@pytest.mark.parametrize(
    "name",
    [
        "LVLLM_SERVICE_HOST",
        "LVLLM_SERVICE_PORT",
        "LVLLM_SERVICE_PORT_HTTP",
        "LVLLM_PORT",
        "LVLLM_PORT_8000_TCP",
        "LVLLM_PORT_8000_TCP_ADDR",
        "LK_SERVER_SERVICE_HOST",
    ],
)
def test_a_variable_that_kubernetes_sets_for_a_service_is_explained(name: str) -> None:
    with pytest.raises(variables.SettingError, match=f"{name} is not a setting.*Kubernetes sets"):
        variables.check_names({name: "tcp://10.0.0.1:8000"})


def test_no_setting_is_taken_for_a_variable_of_a_service() -> None:
    names = [variable.name for variable in variables.VARIABLES]
    assert not [name for name in names if variables.OF_A_SERVICE.search(name)]


def test_document_has_every_variable() -> None:
    document = variables.markdown()
    assert all(f"| `{variable.name}` |" in document for variable in variables.VARIABLES)
