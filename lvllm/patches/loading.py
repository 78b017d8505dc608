"""vLLM's loading of models with experts: LvLLM's reader, checks of its own, errors of one line.

vLLM has a public seam, `register_model_loader`, which LvLLM does not use. A load format of our own
would change what users write, and the existing ones (`auto`, `hf`, `safetensors`, `mistral`) can be
taken over only with a warning in every process that the format is already registered. A loader
would also have to copy the private `_get_weights_iterator`, since that chooses the files and the
iterator in one function.
"""

from collections.abc import Iterator
from typing import Any

from lvllm.patches.registry import patch

__all__ = [
    "check_all_rows",
    "check_memory_of_made_up_weights",
    "check_names",
    "end_in_one_line",
    "read_safetensors",
    "refuse_pickles",
]

NOT_A_LOADER = (
    "none, because vLLM offers register_model_loader for this, which lvllm/patches/loading.py says"
    " why not to use"
)


@patch(
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
    signature="(self, vllm_config, model_config, prefix='')",
    why="vLLM prints a traceback in each process for every error about a checkpoint, and does not"
    " name the tensor. Of what LvLLM can describe, one line is left.",
    upstream=NOT_A_LOADER,
    until="vLLM's front process reports an error of a worker by its own text",
)
def end_in_one_line(original: Any) -> Any:
    from lvllm.loading import model_loader

    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        return model_loader.end_in_one_line(
            lambda: original(self, vllm_config, model_config, prefix)
        )

    return load_model


@patch(
    "vllm.model_executor.model_loader.default_loader:safetensors_weights_iterator",
    signature="(hf_weights_files, use_tqdm_on_load, safetensors_load_strategy=None,"
    " local_expert_ids=None, *, safetensors_prefetch_num_threads=8,"
    " safetensors_prefetch_block_size=16777216)",
    why="vLLM maps whole files, whose pages count as resident memory next to the experts, and"
    " copies each tensor from there on one thread. LvLLM reads straight into the parameters.",
    upstream=NOT_A_LOADER,
    until="a load format can bring its own iterator and be the default of a platform",
)
def read_safetensors(original: Any) -> Any:
    from lvllm.loading import model_loader

    def safetensors_weights_iterator(
        hf_weights_files: list[str],
        use_tqdm_on_load: bool,
        safetensors_load_strategy: str | None = None,
        local_expert_ids: set[int] | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        if safetensors_load_strategy is None and model_loader.has_experts():
            return model_loader.weights_iterator(
                hf_weights_files, use_tqdm_on_load, local_expert_ids
            )
        read: Iterator[Any] = original(
            hf_weights_files,
            use_tqdm_on_load,
            safetensors_load_strategy,
            local_expert_ids,
            **options,
        )
        return read

    return safetensors_weights_iterator


@patch(
    "vllm.model_executor.model_loader.default_loader:pt_weights_iterator",
    signature="(hf_weights_files, use_tqdm_on_load, pt_load_map_location='cpu')",
    why="Without safetensors, vLLM's default formats fall back to pickles, which may run code when"
    " they are read. LvLLM refuses them unless their load format is asked for.",
    upstream="none, because the fallback is vLLM's documented behaviour",
    until="vLLM reads pickles only when their load format is asked for",
)
def refuse_pickles(original: Any) -> Any:
    from lvllm.loading import model_loader

    def pt_weights_iterator(hf_weights_files: list[str], *args: Any, **options: Any) -> Any:
        if model_loader.has_experts():
            model_loader.refuse_pickles(hf_weights_files)
        return original(hf_weights_files, *args, **options)

    return pt_weights_iterator


@patch(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights",
    signature="(self, model, model_config)",
    why="vLLM does not notice a linear layer or an embedding of which rows are missing from the"
    " checkpoint, and the model answers with noise.",
    upstream="none, because nothing was proposed yet",
    until="vLLM's track_weights_loading checks linear layers and embeddings",
)
def check_all_rows(original: Any) -> Any:
    from lvllm.loading import model_loader

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        if not model_loader.has_experts():
            original(self, model, model_config)
            return
        model_loader.load_completely(
            lambda: original(self, model, model_config),
            model,
            is_draft=model_config.runner_type == "draft",
        )

    return load_weights


@patch(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.track_weights_loading",
    signature="(self, model, loaded_weights, quantized=False)",
    also=("(self, model, loaded_weights)",),
    why="vLLM's error about missing weights is a set of all their names below a traceback. LvLLM"
    " compares the names itself and names the first one in one line.",
    upstream="none, because only the form of the error differs",
    until="vLLM's error is one line",
)
def check_names(original: Any) -> Any:
    from lvllm.checkpoint.headers import CheckpointError
    from lvllm.loading import completeness, model_loader

    def track_weights_loading(
        self: Any, model: Any, loaded_weights: set[str] | None, *args: Any, **options: Any
    ) -> None:
        if not model_loader.has_experts():
            original(self, model, loaded_weights, *args, **options)
            return
        completeness.require_names(model, loaded_weights)
        try:
            original(self, model, loaded_weights, *args, **options)
        except ValueError as error:  # vLLM may check more than LvLLM does, in words of its own
            raise CheckpointError(str(error)) from error

    return track_weights_loading


@patch(
    "vllm.model_executor.model_loader.dummy_loader:DummyModelLoader.load_weights",
    signature="(self, model, model_config)",
    why="With the load format `dummy` there are no files from which to tell in front how much"
    " memory the model takes. Without this check the kernel would kill the process on the way.",
    upstream="none, because vLLM makes up weights on a GPU, whose allocator reports what is short",
    until="vLLM checks the memory of a model on the CPU before it fills it",
)
def check_memory_of_made_up_weights(original: Any) -> Any:
    from lvllm.loading import model_loader

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        if model_loader.has_experts():
            model_loader.check_memory(model)
        original(self, model, model_config)

    return load_weights
