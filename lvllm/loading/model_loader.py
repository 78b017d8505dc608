"""vLLM's loading with LvLLM's reader, and its errors in one line.

Which files a model has, what of them a rank needs and under which names stays vLLM's: `install`
replaces what it iterates over safetensors files with, and watches over the whole of its loading.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm.auto import tqdm
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.model_loader import default_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import enable_tqdm

from lvllm.checkpoint.headers import Checkpoint, TensorInfo, pickle_refused
from lvllm.faults import process
from lvllm.loading.completeness import require_all
from lvllm.loading.reader import FileTensor, Reader, in_loading_order
from lvllm.log import logger
from lvllm.machine import memory_plan
from lvllm.moe.arrivals import LayerError
from lvllm.settings.configuration import HybridConfig
from lvllm.worker import startup

__all__ = ["describe", "install", "weights_iterator"]


_current: TensorInfo | None = None
"""The tensor that the model's own loading code has in hand."""


def install() -> None:
    """Put LvLLM's iterator over weights in the place of vLLM's, and end its errors in one line."""
    safetensors = default_loader.safetensors_weights_iterator
    if safetensors.__module__ == __name__:
        return
    pickles = default_loader.pt_weights_iterator
    load = BaseModelLoader.load_model
    load_weights = default_loader.DefaultModelLoader.load_weights
    make_up_weights = DummyModelLoader.load_weights

    def safetensors_weights_iterator(
        files: list[str], use_tqdm: bool, strategy: str | None = None, *args: Any, **options: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if strategy is None and _load_format() is not None:
            return weights_iterator(files, use_tqdm, options.get("local_expert_ids"))
        return safetensors(files, use_tqdm, strategy, *args, **options)

    def pt_weights_iterator(files: list[str], *args: Any, **options: Any) -> Any:
        # What `auto` and `hf` take where there are no safetensors.
        if _load_format() in ("auto", "hf"):
            raise pickle_refused(Path(files[0]))
        return pickles(files, *args, **options)

    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        global _current
        _current = None
        try:
            return load(self, *args, **options)
        except Exception as error:
            line = describe(error)
            if line is None:
                raise
            logger.debug("Loading failed", exc_info=True)
            process.end(line)

    def load_all_weights(self: Any, model: Any, model_config: Any) -> None:
        if _load_format() is None or model_config.runner_type == "draft":
            # A draft may get its embeddings from the model that it drafts for.
            load_weights(self, model, model_config)
        else:
            require_all(lambda: load_weights(self, model, model_config), model)

    def make_up_all_weights(self: Any, model: Any, model_config: Any) -> None:
        if _load_format() is not None:
            cache = get_current_vllm_config().cache_config
            memory_plan.check_built(model, cache.kv_cache_memory_bytes or 0)
        make_up_weights(self, model, model_config)

    default_loader.DefaultModelLoader.load_weights = load_all_weights
    DummyModelLoader.load_weights = make_up_all_weights
    default_loader.safetensors_weights_iterator = safetensors_weights_iterator
    default_loader.pt_weights_iterator = pt_weights_iterator
    BaseModelLoader.load_model = load_model


def _load_format() -> str | None:
    """Of a model with experts; None if it has none."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or not vllm_config.model_config.get_num_experts():
        return None
    return str(vllm_config.load_config.load_format)


def weights_iterator(
    files: list[str], use_tqdm: bool, local_expert_ids: set[int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs of safetensors files in loading order, without the experts of other
    ranks if `local_expert_ids` says which are this one's. Raises CheckpointError.
    """
    global _current
    checkpoint = Checkpoint.of_files(sorted(files))
    wanted = [
        info
        for info in in_loading_order(checkpoint.tensors.values())
        if not should_skip_weight(info.name, local_expert_ids)
    ]
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
            _current = tensor.source.info
            yield _current.name, tensor
            bar.update(_current.nbytes)
    _current = None
    seconds = time.perf_counter() - start
    gib = reader.bytes_read / (1 << 30)
    logger.info_once(
        "LvLLM: read %.2f GiB of weights in %.1f s, %.2f GiB/s", gib, seconds, gib / seconds
    )


def describe(error: Exception) -> str | None:
    """One line about an error while a model was built or loaded; None if it is not about that."""
    said = " ".join(str(error).split())
    if isinstance(error, LayerError):
        return said
    info = _in_hand(error.__traceback__) or _current
    ours = isinstance(error, ValueError | MemoryError) and _raised_by_lvllm(error.__traceback__)
    if ours and (info is None or isinstance(error, MemoryError) or str(info.file) in said):
        return said
    if info is None:
        return None
    if not ours:
        said = f"does not fit the model: {type(error).__name__}: {said}"
    dtype = str(info.dtype).removeprefix("torch.")
    return str(info.refuse(f"{dtype} {list(info.shape)}: {said}"))


def _raised_by_lvllm(traceback: TracebackType | None) -> bool:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    module = str(traceback.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] == "lvllm"


def _in_hand(traceback: TracebackType | None) -> TensorInfo | None:
    """The tensor that the innermost function that has one has in a variable; of several, the one
    that came last, if it is among them.
    """
    found = None
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            if isinstance(value, FileTensor):
                if value.source.info is _current:
                    return _current
                found = value.source.info
        traceback = traceback.tb_next
    return found
