"""vLLM's CPU worker, which reports with each step's output which requests met NaN or infinity."""

from copy import copy
from itertools import accumulate
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_world_group
from vllm.v1.worker.cpu_worker import CPUWorker

from lvllm.errors import LvllmError
from lvllm.faults import leaving, process
from lvllm.faults.nonfinite import Watch, layers_of, open_watch
from lvllm.faults.request import set_faults
from lvllm.gpu import mark_step
from lvllm.machine import compiler
from lvllm.moe.arrivals import NOT_AGAIN
from lvllm.patches import PatchError, install
from lvllm.patches.registry import MODEL_LOADED
from lvllm.worker import expert_cache, experts, verification
from lvllm.worker.counting import Steps, count_worker


class HybridCPUWorker(CPUWorker):
    """vLLM's worker with a watch around the forward pass of each step.

    Raises RuntimeError, which ends the engine, where a fault cannot be traced to requests. That is
    so where rows of several schedulers meet in one batch (data parallelism), where ranks are on
    several hosts, and where vLLM's second model runner is in use.
    """

    _watch: Watch | None = None
    _steps = Steps(None)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As vLLM's worker, whose errors about the machine's memory end in one line."""
        if compiler.lacking() is not None:
            # vLLM compiles a few functions in any mode, such as one for log-probabilities.
            torch.compiler.set_stance("force_eager")
        try:
            super().__init__(*arguments, **options)
        except ValueError as error:
            process.end(str(error))

    def load_model(self, **arguments: Any) -> None:
        super().load_model(**arguments)
        try:
            install("cpu", MODEL_LOADED)
        except PatchError as error:
            process.end(str(error))
        self._make_room_for_earlier_stages()
        experts.warn_if_none_are_ours(self.vllm_config, self.model_runner.get_model())
        verification.at_start(self.vllm_config, self.model_runner.get_model())
        config = self.parallel_config
        self._per_request = (
            config.data_parallel_size == 1
            and config.nnodes == 1
            and not config.use_ray
            and not self.use_v2_model_runner
        )
        self._faults: dict[str, str] = {}
        try:
            self._watch = open_watch(
                layers_of(self.model_runner.get_model(), self.model_config.dtype),
                rows=self.scheduler_config.max_num_batched_tokens,
                steps=config.pipeline_parallel_size,
                group=get_world_group() if self._per_request else None,
                seen=(get_pp_group().rank_in_group + 1)
                * (config.world_size // config.pipeline_parallel_size),
            )
        except RuntimeError:
            process.follow()  # A rank whose share of the checkpoint is damaged has ended by now.
            raise

    def determine_available_memory(self) -> int:
        """Measure memory, of which the stand-in for a GPU gives some to its cache of experts."""
        return expert_cache.leave_room(self, int(super().determine_available_memory()))

    def compile_or_warm_up_model(self) -> Any:
        """Warm the model up, and count from then on."""
        times = super().compile_or_warm_up_model()
        self._steps = count_worker(self)
        return times

    def shutdown(self) -> None:
        leaving.collect_nothing_more()
        expert_cache.save()
        super().shutdown()

    def reload_weights(self, *_: Any, **__: Any) -> None:
        """Refuse what vLLM's workers can do."""
        raise LvllmError(NOT_AGAIN)

    def verify_experts(self) -> list[str]:
        """See `lvllm verify`."""
        return verification.verify_experts(self.vllm_config, self.model_runner.get_model())

    def _make_room_for_earlier_stages(self) -> None:
        """Make the tensors into which a later stage of a pipeline receives its input.

        vLLM's runner makes them in its first dummy run, but without compilation there is no dummy
        run on the CPU.
        """
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=self.model_config.dtype,
                device=self.device,
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        self._steps.add(scheduler_output)
        mark_step()  # The stand-in for a GPU replaces experts in its cache.
        if self._watch is None:
            return super().execute_model(scheduler_output)
        self._faults = {}
        self._watch.start()
        try:
            output = super().execute_model(scheduler_output)
        finally:
            hit = self._watch.stop()
        if hit:
            if not self._per_request:
                raise RuntimeError(f"LvLLM: {self._watch.any_fault()}")
            scheduled = scheduler_output.num_scheduled_tokens
            batch = self.model_runner.input_batch
            self._rows = [scheduled.get(request, 0) for request in batch.req_ids]
            self._faults = self._watch.faults(zip(batch.req_ids, self._rows, strict=True))
        return output if output is None else self._end(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._end(super().sample_tokens(grammar_output))

    def _end(self, output: Any) -> Any:
        """The output of a step, with the faults that happened in it."""
        if not self._faults:
            return output
        self._clear_caches()
        output = copy(output)  # vLLM uses one and the same object for all empty outputs.
        set_faults(output, self._faults)
        self._faults = {}
        return output

    @torch.inference_mode()
    def _clear_caches(self) -> None:
        """Zero the blocks of keys and values that faulty requests wrote in this step.

        Attention multiplies the unwritten rest of a block with zero, and zero times NaN is NaN, so
        the next request that gets such a block would fail too. No other request reads these blocks:
        the blocks that requests share were complete before this step.
        """
        runner: Any = self.model_runner
        requests = runner.input_batch.req_ids
        ends = list(accumulate(self._rows))
        layers = self.vllm_config.compilation_config.static_forward_context
        groups = runner.kv_cache_config.kv_cache_groups
        for group, table in zip(groups, runner.input_batch.block_table.block_tables, strict=True):
            blocks = set()
            for request, rows, end in zip(requests, self._rows, ends, strict=True):
                if request in self._faults:
                    blocks.update(table.slot_mapping.np[end - rows : end] // table.block_size)
            for name in group.layer_names:
                cache: Any = getattr(layers.get(name), "kv_cache", None)
                if hasattr(cache, "shape"):  # The state of a linear attention has no blocks.
                    for block in blocks:
                        cache[int(block)].zero_()
