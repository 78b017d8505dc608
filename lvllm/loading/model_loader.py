"""The loading of a model: vLLM's own, with LvLLM's reader, checks and errors of one line.

Which files a model has, which of their tensors a rank needs and what the names mean stays vLLM's.
`lvllm.patches.loading` puts these functions into vLLM's loaders.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import Module
from tqdm.auto import tqdm
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import enable_tqdm

from lvllm import startup
from lvllm.checkpoint.headers import Checkpoint, pickle_refused
from lvllm.errors import LvllmError, TensorError
from lvllm.faults import process
from lvllm.formats import gpt_oss
from lvllm.loading import completeness, in_hand
from lvllm.loading.reader import Reader, in_loading_order
from lvllm.log import logger
from lvllm.machine import memory_plan
from lvllm.settings.configuration import HybridConfig
from lvllm.units import GIB

__all__ = [
    "check_memory",
    "describe",
    "end_in_one_line",
    "has_experts",
    "load_completely",
    "refuse_pickles",
    "tensors_of",
    "weights_iterator",
]

Result = TypeVar("Result")


def has_experts() -> bool:
    """Whether an engine is loading a model with experts; all others load as vLLM does."""
    if HybridConfig.current_or_none() is None:
        return False
    return bool(get_current_vllm_config().model_config.get_num_experts())


def end_in_one_line(load_model: Callable[[], Result]) -> Result:
    """Call `load_model`, and end this process in one line if that raises what `describe` knows."""
    in_hand.clear()
    try:
        return load_model()
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        logger.debug("Loading failed", exc_info=True)
        process.end(line)


def describe(error: Exception) -> str | None:
    """One line about an error that ended the building or loading of a model.

    For an LvllmError that is its text. Any other error is taken to be about the tensor in hand,
    such as vLLM's assertions that two shapes are equal. Without a tensor in hand the result is
    None, since only a traceback tells where such an error comes from.
    """
    said = " ".join(str(error).split())
    if isinstance(error, LvllmError) and not isinstance(error, TensorError):
        return said
    info = in_hand.tensor()
    if info is None:
        return said if isinstance(error, TensorError) else None
    if not isinstance(error, TensorError):
        said = f"does not fit the model: {type(error).__name__}: {said}"
    dtype = str(info.dtype).removeprefix("torch.")
    return str(info.refuse(f"{dtype} {list(info.shape)}: {said}"))


def weights_iterator(
    files: list[str], use_tqdm: bool, local_expert_ids: set[int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs of safetensors files in loading order.

    `local_expert_ids` are the experts of this rank, and those of other ranks are left out. None
    stands for all experts. Raises CheckpointError.
    """
    checkpoint = Checkpoint.of_files(sorted(files))
    return tensors_of(checkpoint, use_tqdm, local_expert_ids)


def tensors_of(
    checkpoint: Checkpoint, use_tqdm: bool, local_expert_ids: set[int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs of a checkpoint, as `weights_iterator` has them."""
    wanted = [
        info
        for info in in_loading_order(checkpoint.tensors.values())
        if not should_skip_weight(info.name, local_expert_ids)
    ]
    config = get_current_vllm_config().model_config.hf_config
    if config.model_type == "gpt_oss":
        gpt_oss.check_shapes(config, wanted)
    reader = Reader(HybridConfig.current().engine_cpus[startup.host_rank()])
    start = time.perf_counter()
    with tqdm(
        total=sum(info.nbytes for info in wanted),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not enable_tqdm(use_tqdm),
    ) as bar:
        for tensor in reader.read(wanted):
            info = tensor.source.info
            yield info.name, tensor
            bar.update(info.nbytes)
    seconds = time.perf_counter() - start
    read = reader.bytes_read / GIB
    logger.info_once(
        "LvLLM: read %.2f GiB of weights in %.1f s, %.2f GiB/s", read, seconds, read / seconds
    )


def refuse_pickles(files: list[str]) -> None:
    """Raise CheckpointError if vLLM is about to read `files`, pickles, that nobody asked for.

    The load formats `auto` and `hf` fall back to pickles where a folder has no safetensors.
    """
    if get_current_vllm_config().load_config.load_format in ("auto", "hf"):
        raise pickle_refused(Path(files[0]))


def load_completely(load_weights: Callable[[], None], model: Module, *, is_draft: bool) -> None:
    """Call `load_weights`, which fills `model`. Raises CheckpointError if weights are missing.

    A draft model is not checked, since it may take its embeddings from the model it drafts for.
    """
    if is_draft:
        load_weights()
    else:
        # With `--convert classify` vLLM gives any model a head, which its checkpoint may lack.
        converted = get_current_vllm_config().model_config.convert_type == "classify"
        completeness.load_all_rows(load_weights, model, "score" if converted else None)
    in_hand.clear()


def check_memory(model: Module) -> None:
    """Raise LvllmError if `model`, whose weights will be made up, does not fit into memory."""
    cache = get_current_vllm_config().cache_config
    try:
        memory_plan.check_built(model, cache.kv_cache_memory_bytes or 0)
    except MemoryError as error:
        raise LvllmError(str(error)) from None
