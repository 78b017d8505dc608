"""The model families whose GGUF files are served."""

from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.families import (
    deepseek,
    gemma,
    glm,
    gpt_oss,
    mixtral,
    nemotron,
    phi,
    qwen,
    qwen_next,
)
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["ARCHITECTURES", "METHOD", "architecture_of"]

METHOD = "gguf"
"""What `quant_method` of config.json says."""
ARCHITECTURES: dict[str, Architecture] = {
    "qwen3moe": qwen.QWEN3,
    "qwen2moe": qwen.QWEN2,
    "qwen3next": qwen_next.QWEN3_NEXT,
    "qwen35moe": qwen_next.QWEN3_5,
    "olmoe": qwen.OLMOE,
    "deepseek2": deepseek.DEEPSEEK,
    "glm4moe": glm.GLM4,
    "gpt-oss": gpt_oss.GPT_OSS,
    "gemma4": gemma.GEMMA4,
    "minimax-m2": mixtral.MINIMAX,
    "nemotron_h_moe": nemotron.NEMOTRON,
    "llama": mixtral.MIXTRAL,
    "phimoe": phi.PHI,
}
"""The families that are served, by the file's `general.architecture`."""


def architecture_of(fields: Fields) -> Architecture:
    """The family of a model. Raises CheckpointError for one that is not served."""
    found = ARCHITECTURES.get(fields.architecture)
    if found is None:
        raise CheckpointError(
            f"{fields.header.file}: GGUF files of the architecture"
            f" {quoted(fields.architecture)} are not served; served are {', '.join(ARCHITECTURES)}"
        )
    return found
