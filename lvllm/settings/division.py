"""Check that parallelism divides the model's attention heads and its experts' rows.

vLLM gives each process equal parts of both. Where a number of processes does not divide a size, its
workers would end in an assertion that names neither. Whole experts need not divide evenly.
"""

from typing import Any

from lvllm.settings.variables import SettingError

__all__ = ["check_heads", "check_rows", "divides_heads", "rows_of_expert"]


def check_heads(model: Any, parallel: Any) -> None:
    """Raise SettingError if tensor parallelism divides the attention heads unevenly."""
    size = parallel.tensor_parallel_size
    if divides_heads(*_heads(model), size):
        return
    heads, kv_heads = _heads(model)
    raise SettingError(
        f"tensor-parallel-size={size} is not allowed for {model.model}: it does not divide its"
        f" {heads} attention heads and {kv_heads} KV heads; allowed is {_allowed(model, parallel)},"
        f" or data-parallel-size={size} with enable-expert-parallel=True"
    )


def check_rows(model: Any, parallel: Any) -> None:
    """Raise SettingError if tensor and data parallelism divide each expert's rows unevenly."""
    tensor, data = parallel.tensor_parallel_size, parallel.data_parallel_size
    if _divides_rows(model, parallel, tensor):
        return
    setting, allowed = f"tensor-parallel-size={tensor}", ""
    if data > 1:
        setting = f"data-parallel-size={data} with {setting}"
    if sizes := _allowed(model, parallel):
        allowed = f", or tensor-parallel-size {sizes}"
    rows = rows_of_expert(model.hf_text_config)
    raise SettingError(
        f"{setting} is not allowed for {model.model}: {tensor * data} processes do not divide the"
        f" {rows} rows of each expert; allowed is enable-expert-parallel=True, which divides whole"
        f" experts{allowed}"
    )


def _allowed(model: Any, parallel: Any) -> str:
    """The tensor-parallel sizes that divide heads and rows evenly, beside the other settings."""
    sizes = range(1, _heads(model)[0] + 1)
    return ", ".join(
        str(size)
        for size in sizes
        if divides_heads(*_heads(model), size) and _divides_rows(model, parallel, size)
    )


def _heads(model: Any) -> tuple[int, int]:
    """How many attention heads and how many KV heads the model has."""
    return model.model_arch_config.total_num_attention_heads, model.get_total_num_kv_heads()


def divides_heads(heads: int, kv_heads: int, size: int) -> bool:
    """Whether so many processes can have equal parts of attention."""
    # Where there are more processes than KV heads, each head is copied to equally many processes.
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def rows_of_expert(config: Any) -> int | None:
    """The rows of an expert's gate projection; None if they are unknown or differ by layer.

    `config` is that of the language model.
    """
    # Models without dense layers, such as Mixtral and gpt-oss, have the second field alone.
    rows = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", None
    )
    return rows if isinstance(rows, int) else None


def _divides_rows(model: Any, parallel: Any, size: int) -> bool:
    rows = rows_of_expert(model.hf_text_config)
    if parallel.enable_expert_parallel or rows is None:
        return True
    # Data-parallel replicas divide each expert among them as well.
    return rows % (size * parallel.data_parallel_size) == 0
