"""LvLLM's checks of every configuration, whichever way vLLM was started, and of its file."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

from lvllm.errors import quoted
from lvllm.patches.registry import patch

__all__ = [
    "check_every_configuration",
    "check_heads_first",
    "check_the_files_of_options",
    "pass_refusals_on",
    "read_the_file_exactly",
]


@patch(
    "vllm.platforms:current_platform.__class__.check_and_update_config",
    signature="(cls, vllm_config)",
    why="vLLM has no hook between its complete configuration and the start of its processes. Every"
    " way of starting passes this class method of the platform, the last part of vLLM that may"
    " change values.",
    upstream="https://github.com/vllm-project/vllm/issues/19161 (a wider proposal); draft:"
    " docs/upstream/configuration-hook.md",
    until="plugins may register a function that gets the complete VllmConfig",
)
def check_every_configuration(original: Any) -> Any:
    from lvllm import prepare
    from lvllm.faults import process

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        with process.refusing():
            prepare.prepare(vllm_config)

    return check_and_update_config


@patch(
    "vllm.config.model:ModelConfig.verify_with_parallel_config",
    signature="(self, parallel_config)",
    why="A tensor-parallel size that does not divide the attention heads ends in a traceback of the"
    " configuration, and one that does not divide the KV heads in an assertion of each worker."
    " Neither says which sizes are allowed. vLLM checks the heads before the complete"
    " configuration, which LvLLM checks, exists.",
    upstream="none, because vLLM refuses the same sizes",
    until="vLLM checks KV heads as well, and says which sizes are allowed",
)
def check_heads_first(original: Any) -> Any:
    from lvllm.faults import process
    from lvllm.settings.division import check_heads
    from lvllm.settings.model_checks import is_moe

    def verify_with_parallel_config(self: Any, parallel_config: Any) -> None:
        with process.refusing():
            if is_moe(self):
                check_heads(self, parallel_config)
        original(self, parallel_config)

    return verify_with_parallel_config


@patch(
    "vllm.utils.argparse_utils:FlexibleArgumentParser.load_config_file",
    signature="(self, file_path)",
    why="vLLM makes arguments of the keys of --config FILE. Of a dotted key it drops `false`, lets"
    " `true` take the next argument as its value, and makes several arguments of a list, so that"
    " a setting would mean something else than `lvllm env --config FILE` says. Of a key that is"
    " written twice it takes the last, and a file that it cannot read ends in a traceback.",
    upstream="https://github.com/vllm-project/vllm/issues/51401 (`false` of options that exist)",
    until="vLLM gives the values of dotted keys to the configuration with their types",
)
def read_the_file_exactly(original: Any) -> Any:
    from lvllm.errors import LvllmError
    from lvllm.settings import config_file
    from lvllm.settings.resolving import resolve

    def load_config_file(self: Any, file_path: str) -> Any:
        try:
            file = config_file.read(Path(file_path))
            resolve(os.environ, config_file.section(file))
        except LvllmError as error:
            raise SystemExit(f"lvllm: {error}") from None
        with NamedTemporaryFile("w", suffix=".yaml") as exact:
            yaml.safe_dump(config_file.as_arguments(file), exact, sort_keys=False)
            exact.flush()
            return original(self, exact.name)

    return load_config_file


@patch(
    "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args",
    signature="(self, args=None, namespace=None)",
    why="A chat template, a certificate, an adapter or a plugin that cannot be read ends"
    " `vllm serve` in a traceback, mostly once the model is loaded. A pipe in its place is waited"
    " for, and of a plugin vLLM only logs that it is missing.",
    upstream="none, because nothing was proposed yet",
    until="vLLM looks at these files before it loads the model",
)
def check_the_files_of_options(original: Any) -> Any:
    from lvllm.errors import LvllmError
    from lvllm.settings import option_files

    def parse_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parsed = original(self, args, namespace)
        if hasattr(parsed, "api_server_count"):  # It serves.
            try:
                option_files.check(vars(parsed))
            except LvllmError as error:
                raise SystemExit(f"lvllm: {error}") from None
        return parsed

    return parse_args


@patch(
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    signature="(self, usage_context=None, headless=False)",
    why="vLLM's configuration is a class of pydantic, which wraps a refusal of LvLLM in lines about"
    " the values of all its fields. A program that uses vLLM as a library gets the one line. And a"
    " damaged config.json, or a name in it that vLLM does not know, ends in a traceback before"
    " there is a configuration to be checked, or a damaged file of the tokenizer or of the"
    " generation's defaults is passed over. And vLLM reads no GGUF files, for which LvLLM makes a"
    " folder here, and on a CPU without a C++ compiler its compiled mode ends in a traceback.",
    upstream="none, because vLLM's own refusals are wrapped alike",
    until="plugins may register a function that gets the complete VllmConfig",
)
def pass_refusals_on(original: Any) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from pydantic import ValidationError

    from lvllm import prepare
    from lvllm.errors import LvllmError
    from lvllm.faults import process
    from lvllm.upstream import model_names

    def create_engine_config(self: Any, *arguments: Any, **options: Any) -> Any:
        with process.refusing():
            prepare.take_gguf(self)
            prepare.check_files(self)
            prepare.check_compilation(self)
        try:
            return original(self, *arguments, **options)
        except StrictDataclassError as error:  # what transformers raises about config.json
            said = " ".join(str(error).split())
            raise process.refusal(
                f"{self.hf_config_path or self.model}: config.json: {said}"
            ) from None
        except ValidationError as error:
            refusal = error.errors()[0].get("ctx", {}).get("error")
            if isinstance(refusal, LvllmError):
                raise refusal from None
            folder = Path(self.hf_config_path or self.model)
            line = model_names.explain(folder, self.hf_overrides, str(refusal))
            if line is not None:
                raise process.refusal(line) from None
            if process.is_command():
                raise process.refusal(_in_one_line(error)) from None
            raise

    return create_engine_config


def _in_one_line(error: Any) -> str:
    """What a ValidationError says first, without the values of all other fields."""
    found = error.errors()[0]
    said = " ".join(found["msg"].removeprefix("Value error, ").split())
    where = ".".join(map(str, found["loc"]))
    return f"{where}={quoted(found['input'])} is not allowed: {said}" if where else said
