"""The files of examples/configs, read as `vllm serve --config FILE` reads them.

vLLM's parser alone would miss mistakes: it accepts abbreviated names, drops an unknown
`name: false`, and does not look inside speculative_config and additional_config before it has the
model. `check` refuses these mistakes, too. Nothing is downloaded, and no model is run.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lvllm.settings.resolving import resolve

vllm = pytest.importorskip("vllm")

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "examples" / "configs"


class Family(NamedTuple):
    """`architectures` and `model_type` in the `config.json` of a file's model."""

    architecture: str
    model_type: str


FAMILIES = {
    "deepseek-v3": Family("DeepseekV3ForCausalLM", "deepseek_v3"),
    "deepseek-v3.2": Family("DeepseekV32ForCausalLM", "deepseek_v32"),
    "gemma-4-moe": Family("Gemma4ForConditionalGeneration", "gemma4"),
    "glm-4-moe": Family("Glm4MoeForCausalLM", "glm4_moe"),
    "glm-4.6v": Family("Glm4vMoeForConditionalGeneration", "glm4v_moe"),
    "glm-4.7-flash": Family("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
    "gpt-oss": Family("GptOssForCausalLM", "gpt_oss"),
    "kimi-k2": Family("DeepseekV3ForCausalLM", "kimi_k2"),
    "kimi-k2.5": Family("KimiK25ForConditionalGeneration", "kimi_k25"),
    "longcat-flash": Family("LongcatFlashForCausalLM", "longcat_flash"),
    "minimax-m2": Family("MiniMaxM2ForCausalLM", "minimax_m2"),
    "mixtral": Family("MixtralForCausalLM", "mixtral"),
    "nemotron-h-moe": Family("NemotronHForCausalLM", "nemotron_h"),
    "olmoe": Family("OlmoeForCausalLM", "olmoe"),
    "phi-moe": Family("PhiMoEForCausalLM", "phimoe"),
    "qwen3-coder": Family("Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3-coder-next": Family("Qwen3NextForCausalLM", "qwen3_next"),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3-next": Family("Qwen3NextForCausalLM", "qwen3_next"),
    "qwen3-vl-moe": Family("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    "qwen3.5-moe": Family("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
    "step-3.5-flash": Family("Step3p5ForCausalLM", "step3p5"),
}

# Draft models that have a checkpoint of their own.
DRAFTS = {
    "google/gemma-4-26B-A4B-it-assistant": Family("Gemma4AssistantForCausalLM", "gemma4_assistant"),
}

# Files contain settings that are switched off: comments of the form `name: value`.
OFF = re.compile(r"^# (?=[a-z][\w.-]*: \S+$)", re.MULTILINE)


@cache
def serve_parser() -> Any:
    """vLLM's parser for the arguments of `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


def parse(file: Path) -> Namespace:
    """The arguments of `vllm serve --config file`. Raises ValueError if vLLM refuses the file."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        arguments = serve_parser().parse_args(["serve", "--config", str(file)])
        ServeSubcommand().validate(arguments)
    except (SystemExit, TypeError) as error:
        raise ValueError(f"vLLM refuses {file.name}") from error
    return arguments


def written(text: str) -> dict[str, Any]:
    """The settings in a file's text, by vLLM's names; `a.b: c` becomes `a: {b: c}`."""
    names = re.findall(r"^([\w.-]+):", text, re.MULTILINE)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice} is written twice")
    settings: dict[str, Any] = {}
    for name, value in yaml.safe_load(text).items():
        first, *inner = name.split(".")
        path = [first.replace("-", "_"), *inner]
        place = settings
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = _number(value)
    return settings


def _number(value: Any) -> Any:
    """A size such as "16G" as a number of bytes; any other value as it is."""
    match = re.fullmatch(r"([0-9]+)G", value) if isinstance(value, str) else None
    return int(match[1]) << 30 if match else value


def _same(wanted: Any, got: Any) -> bool:
    """Whether an argument has the written value. Types are compared as well, since True == 1."""
    if isinstance(wanted, Mapping):
        inner = got.get if isinstance(got, Mapping) else lambda name: getattr(got, name, None)
        return all(_same(value, inner(name)) for name, value in wanted.items())
    if isinstance(got, Enum):
        got = got.name
    if isinstance(got, list) and not isinstance(wanted, list):
        got = got[0] if len(got) == 1 else got  # arguments that take several values
    return type(wanted) is type(got) and wanted == got


def check(file: Path) -> Namespace:
    """The arguments that `file` gives. Raises ValueError if anything in it would have no effect."""
    settings = written(file.read_text())
    arguments = parse(file)
    for name, value in settings.items():
        if not hasattr(arguments, name):
            raise ValueError(f"{name} is no argument of vllm serve")
        if not _same(value, getattr(arguments, name)):
            raise ValueError(f"{name} is {getattr(arguments, name)!r}, not {value!r}")
    _check_parsers(arguments)
    _check_speculative(arguments.speculative_config or {})
    additional = arguments.additional_config or {}
    if unknown := set(additional) - {"lvllm"}:
        raise ValueError(f"additional_config.{unknown} is nobody's")
    resolve({}, additional.get("lvllm"))
    return arguments


def _check_parsers(arguments: Namespace) -> None:
    """Check that vLLM knows the parsers of tool calls and reasoning, and can import them."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if bool(arguments.tool_call_parser) != bool(arguments.enable_auto_tool_choice):
        raise ValueError("tool-call-parser and enable-auto-tool-choice go together")
    for name, find in (
        (arguments.tool_call_parser, ToolParserManager.get_tool_parser),
        (arguments.reasoning_parser, ReasoningParserManager.get_reasoning_parser),
    ):
        if name:
            try:
                find(name)
            except KeyError as error:
                raise ValueError(f"{name} is no parser of vLLM") from error


def _check_speculative(section: Mapping[str, Any]) -> None:
    """Check the names against the fields of vLLM's SpeculativeConfig, and the method's name."""
    from pydantic import TypeAdapter
    from vllm.config.speculative import SpeculativeConfig, SpeculativeMethod

    if unknown := set(section) - {field.name for field in fields(SpeculativeConfig)}:
        raise ValueError(f"speculative_config has no {unknown}")
    if section:
        TypeAdapter(SpeculativeMethod).validate_python(section.get("method"))  # a ValueError
        if section.get("num_speculative_tokens", 0) < 1:
            raise ValueError("speculative_config drafts no tokens")


def switched_on(text: str) -> str:
    """The text of a file in which all settings are switched on."""
    return OFF.sub("", text)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The name of a file, without its suffix."""
    return request.param


def test_every_file_has_a_family() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(FAMILIES)


@pytest.mark.parametrize("page", ["docs/models.md", "examples/configs/README.md"])
def test_every_file_is_listed(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    assert [name for name in FAMILIES if f"{name}.yaml]" not in text] == []


def test_vllm_gets_what_is_written(family: str) -> None:
    arguments = check(CONFIGS / f"{family}.yaml")
    assert arguments.model.count("/") == 1
    assert arguments.served_model_name


@pytest.mark.parametrize(
    "file",
    [REPOSITORY / "config.yaml", *sorted(CONFIGS.glob("*.yaml"))],
    ids=lambda file: file.stem,
)
def test_the_defaults_are_safe(file: Path) -> None:
    settings = written(file.read_text())
    assert settings["host"] == "127.0.0.1"
    assert not settings.get("trust_remote_code", False)


def test_settings_that_are_off_are_valid(family: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(switched_on((CONFIGS / f"{family}.yaml").read_text()))
    check(file)


def test_vllm_has_the_architecture(family: str) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _TRANSFORMERS_SUPPORTED_MODELS

    architecture = FAMILIES[family].architecture
    assert architecture in ModelRegistry.get_supported_archs()
    assert architecture not in _TRANSFORMERS_SUPPORTED_MODELS  # a backend that LvLLM refuses


@pytest.mark.parametrize(
    "family",
    [name for name in FAMILIES if "# speculative" in (CONFIGS / f"{name}.yaml").read_text()],
)
def test_vllm_has_the_draft_layers(family: str) -> None:
    """`mtp` makes vLLM replace the architecture by one that has the draft layers."""
    from transformers import PretrainedConfig
    from vllm import ModelRegistry
    from vllm.config.speculative import SpeculativeConfig

    text = (CONFIGS / f"{family}.yaml").read_text()
    speculative = written(switched_on(text))["speculative_config"]
    architecture, model_type = DRAFTS.get(speculative.get("model"), FAMILIES[family])
    hf = PretrainedConfig(
        architectures=[architecture], num_nextn_predict_layers=1, mtp_num_hidden_layers=1
    )
    hf.model_type = model_type
    (draft,) = SpeculativeConfig.hf_config_override(hf).architectures
    assert draft != architecture
    assert draft in ModelRegistry.get_supported_archs()


def test_the_cache_holds_the_requests(family: str) -> None:
    """A file says how many KiB a token takes, and its KV cache has room for all its requests."""
    text = (CONFIGS / f"{family}.yaml").read_text()
    settings = written(text)
    if "kv_cache_memory_bytes" not in settings:
        assert "Needs a GPU" in text
        return
    stated = re.search(r"\b(\d+) KiB a token", text)
    assert stated
    tokens = settings["max_num_seqs"] * settings["max_model_len"]
    need = int(stated[1]) * 1024 * tokens
    assert need <= settings["kv_cache_memory_bytes"] <= 2 * need


def test_files_are_short_and_say_why(family: str) -> None:
    lines = (CONFIGS / f"{family}.yaml").read_text().splitlines()
    assert 10 <= len(lines) <= 30
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max-model-len:", "max-model-length:"),  # no such argument
        ("max-model-len:", "max-model-le:"),  # an abbreviation, which vLLM takes
        ("max-num-seqs:", "no-such-argument: false\nmax-num-seqs:"),  # which vLLM drops
        ("max-num-seqs: 4", "max-num-seqs: 4\nmax-num-seqs: 8"),
        ("max-num-seqs: 4", "max-num-seqs: many"),
        ("kv-cache-memory-bytes: 46G", "kv-cache-memory-bytes: 46Q"),
        ("kv-cache-dtype: fp8", "kv-cache-dtype: fp9"),
        ("tool-call-parser: glm47", "tool-call-parser: glm4.7"),
        ("tool-call-parser: glm47\n", ""),
        ("enable-auto-tool-choice: true\n", ""),
        ("reasoning-parser: glm47", "reasoning-parser: glm4.7"),
        ("speculative_config.method: mtp", "speculative_config.method: glm_mtp"),
        ("speculative_config.method:", "speculative_config.methods:"),
        ("num_speculative_tokens: 1", "num_speculative_tokens: 0"),
        ("max-num-seqs:", "additional_config.lvllm.lk_thread: 8\nmax-num-seqs:"),
        ("max-num-seqs:", "additional_config.lvllm.lk_threads: some\nmax-num-seqs:"),
        ("max-num-seqs:", "additional_config.lvlm.lk_threads: 8\nmax-num-seqs:"),
    ],
)
def test_the_check_refuses_mistakes(old: str, new: str, tmp_path: Path) -> None:
    text = switched_on((CONFIGS / "glm-4-moe.yaml").read_text())
    file = tmp_path / "config.yaml"
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError):
        check(file)


def test_the_check_accepts_a_correct_file(tmp_path: Path) -> None:
    text = switched_on((CONFIGS / "glm-4-moe.yaml").read_text())
    file = tmp_path / "config.yaml"
    file.write_text(text + "additional_config.lvllm.lk_threads: 8\ntrust-remote-code: false\n")
    arguments = check(file)
    assert arguments.additional_config == {"lvllm": {"lk_threads": 8}}
    assert arguments.speculative_config == {"method": "mtp", "num_speculative_tokens": 1}
    assert arguments.kv_cache_dtype == "fp8"
    assert check(REPOSITORY / "config.yaml").model == "examples/models/tiny-moe"
