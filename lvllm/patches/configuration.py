"""LvLLM's checks of every configuration, whichever way vLLM was started."""

from typing import Any

from lvllm.patches.registry import patch

__all__ = ["check_every_configuration"]


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
    from lvllm.errors import LvllmError

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        try:
            prepare.prepare(vllm_config)
        except LvllmError as error:
            raise SystemExit(f"lvllm: {error}") from None

    return check_and_update_config
