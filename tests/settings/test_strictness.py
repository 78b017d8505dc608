"""Any value of any setting, from a variable and from YAML: the same value, or one line."""

import string
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lvllm.settings import config_file
from lvllm.settings.kinds import LAYERS, MOST, MOST_LAYER, PROMPT, SIZES, SWITCH, USE_WEIGHT
from lvllm.settings.resolving import resolve
from lvllm.settings.use_weight import UseWeights
from lvllm.settings.variables import BY_KEY, ENVIRONMENT_ONLY, VARIABLES, SettingError, Variable
from lvllm.units import GIB

SECTION = "additional_config.lvllm"
WORDS = sorted({word for v in VARIABLES for word in v.kind.allowed.replace(",", "").split()})
NUMBERS = st.integers(-2, 40) | st.integers() | st.sampled_from([8192, 8193, 86400, MOST, MOST + 1])
TEXTS = (
    NUMBERS.map(str)
    | st.sampled_from([*WORDS, "auto ", "0-1", "0, 1", "3-2", "0-50000000", "９", "٣", "1e3", "08"])
    | st.sampled_from(["true", "false", "off", "0o17", "0x1", "+1", "-0", "1_0", "1e400", "[", "["])
    | st.sampled_from(['[{".*": "INT4"}]', "[{'a': KEEP}]", "[[[[", "[" * 5000, "NaN", "null"])
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
)
VALUES: Any = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.floats() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)


def settled(environ: Mapping[str, str], section: object, key: str) -> tuple[Any, str]:
    """The value of a setting, or why it is refused, in one line that names the setting."""
    try:
        return resolve(environ, section)[key].value, ""
    except SettingError as error:
        said = str(error)
        variable = BY_KEY[key]
        where = variable.name if environ else f"{SECTION}.{key}"
        assert said.startswith(f"{where}=")
        assert said.isprintable()
        assert len(said) < 700
        reason = said.partition(" is not allowed: ")[2]
        assert reason == variable.kind.allowed or (variable.kind is USE_WEIGHT and reason)
        return None, reason


def in_range(variable: Variable, value: Any) -> bool:
    """Whether a value is the default, or of the setting's kind."""
    if value == variable.default:
        return True
    kind = variable.kind
    if kind is SWITCH:
        return type(value) is bool
    if kind is LAYERS:
        return value == tuple(sorted(set(value))) and set(value) <= set(range(MOST_LAYER + 1))
    if kind is USE_WEIGHT:
        return isinstance(value, UseWeights)
    if kind is SIZES:
        return all(one == "auto" or (type(one) is int and 0 <= one < 10**6 * GIB) for one in value)
    if isinstance(value, str):
        return value in kind.allowed.replace(",", "").split()
    least = 2 if kind is PROMPT else int(kind.allowed.partition(" from ")[2].split()[0])
    most = kind.allowed.partition(" to ")[2].split(",")[0]
    bound = int(most) if most.isdecimal() else 8192 if "CPUs" in most else MOST
    return type(value) is int and (least <= value <= bound or (kind is PROMPT and value == 0))


@settings(max_examples=2000)
@given(st.sampled_from(VARIABLES), TEXTS, st.text(string.whitespace, max_size=2))
@example(BY_KEY["gpu_resident_moe_layers"], "0-9999," * 15_000 + "0", "")
def test_a_text_means_the_same_in_a_variable_and_in_yaml(
    variable: Variable, text: str, space: str
) -> None:
    value, reason = settled({variable.name: f"{space}{text}{space}"}, None, variable.key)
    if not reason:
        assert in_range(variable, value)
    if variable.key not in ENVIRONMENT_ONLY:
        assert settled({}, {variable.key: text}, variable.key) == (value, reason)


@settings(max_examples=1000)
@given(st.sampled_from([v for v in VARIABLES if v.key not in ENVIRONMENT_ONLY]), VALUES)
def test_values_of_any_type(variable: Variable, written: Any) -> None:
    value, reason = settled({}, {variable.key: written}, variable.key)
    if reason:
        return
    assert in_range(variable, value)
    if isinstance(written, bool):
        assert variable.kind is SWITCH
        assert value is written
    elif isinstance(written, list):
        assert variable.kind in (LAYERS, SIZES, USE_WEIGHT)
    elif written is None:
        assert value == variable.default
    else:
        assert isinstance(written, int | str) or variable.kind is SIZES
        assert settled({variable.name: str(written)}, None, variable.key) == (value, "")


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("watchdog_seconds", "true"),
        ("omp_num_threads", "true"),
        ("prefill_engine_gpu", "false"),
        ("gpu_prefetch_window", "true"),
        ("gpu_prefill_min_batch_size", "[1]"),
        ("lk_threads", "[1]"),
        ("share_experts", "[1]"),
        ("share_experts", "1.0"),
        ("gpu_resident_moe_layers", "off"),
        ("gpu_resident_moe_layers", "[true]"),
        ("gpu_resident_moe_layers", "[[0]]"),
        ("gpu_resident_moe_layers", "0-50000000"),
        ("lk_threads", "99999999999999999999"),
        ("lk_threads", "2026-01-31"),
        ("lk_threads", "{a: 1}"),
        ("lk_threads", "４"),
        ("lk_threads", "3.0"),
        ("watchdog_seconds", "1e400"),
        ("watchdog_seconds", "1.0e+400"),
        ("watchdog_seconds", ".nan"),
        ("watchdog_seconds", ".inf"),
        ("watchdog_seconds", "0o17"),
        ("gpu_staging_mib", "1" + "0" * 30),
        ("moe_use_weight", "[]"),
        ("moe_use_weight", "{'.*': INT4}"),
        ("moe_use_weight", "[{'.*': true}]"),
        ("moe_use_weight", "[{'a{9999999999}': INT4}]"),
        ("accelerator", "no"),
    ],
)
@pytest.mark.parametrize("dotted", [True, False])
def test_yaml_of_the_wrong_kind(key: str, written: str, dotted: bool, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = f"{SECTION}.{key}: {written}"
    file.write_text(text if dotted else f"additional-config:\n  lvllm:\n    {key}: {written}\n")
    assert settled({}, config_file.section(config_file.read(file)), key)[1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{SECTION}: 3", f"{SECTION}=3 is not allowed: a mapping"),
        (f"{SECTION}: [1]", f"{SECTION}=[1] is not allowed: a mapping"),
        ("additional_config: 3", "additional_config=3 is not allowed: a mapping"),
        ("additional_config: '{\"lvllm\": 3}'", f"{SECTION}=3 is not allowed: a mapping"),
        ("additional_config: '{a: ['", "additional_config='{a: [': not YAML: "),
        ("a_b: 1\na-b: 2", "--config {file}: a-b is written twice"),
        (
            f"{SECTION}.lk_threads: 1\nadditional_config: {{lvllm: {{lk_threads: 2}}}}",
            f"--config {{file}}: {SECTION}.lk_threads is written twice",
        ),
        ("2: 3", "--config {file}: line 1: the name '2' is no text"),
        ("", "--config {file}: a mapping of settings is wanted"),
        (f'"{SECTION}.a\\nb": 1', f"{SECTION}.'a\\nb' is not a setting: "),
    ],
)
def test_sections_that_are_none(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SettingError) as caught:
        resolve({}, config_file.section(config_file.read(file)))
    said = str(caught.value)
    assert said.startswith(line.format(file=file) if "{file}" in line else line)
    assert said.isprintable()


def test_a_file_that_is_not_called_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text("port: 1")
    with pytest.raises(SettingError, match=r"a name that ends in \.yaml or \.yml is wanted$"):
        config_file.read(file)


def test_a_pattern_that_python_cannot_read() -> None:
    rules = [{"(" * 9000 + ")" * 9000: "INT4"}]
    assert settled({}, {"moe_use_weight": rules}, "moe_use_weight")[1].startswith("rule 1: '((((")


def test_names_of_several_lines() -> None:
    with pytest.raises(SettingError) as caught:
        resolve({"LVLLM_A\nB": "1"}, None)
    assert str(caught.value).startswith(r"'LVLLM_A\nB' is not a setting of LvLLM: ")
    assert str(caught.value).isprintable()


def test_nothing_behind_a_key_is_the_default() -> None:
    section = dict.fromkeys(set(BY_KEY) - ENVIRONMENT_ONLY)
    for one in resolve({}, section).values():
        assert (one.value, one.source) == (one.variable.default, "default")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *c]", "line 3: the alias *c stands within what"),
        (f"{SECTION}.lk_threads: 1", None),
    ],
)
def test_the_command(text: str, line: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "from lvllm.cli import main; main()", "env", "--config", str(file)],
        env={"LK_ISA": " portable\n", "LK_ACTIVATION_BITS": "\t16 "},
        capture_output=True,
        text=True,
    )
    if line is None:
        assert (done.returncode, done.stderr) == (0, "")
        assert " portable " in done.stdout
    else:
        assert done.returncode == 1
        assert done.stderr.startswith(f"lvllm: --config {file}: {line}")
        assert len(done.stderr.splitlines()) == 1
