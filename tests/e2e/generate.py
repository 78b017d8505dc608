"""Greedy generation through vLLM, each job in a process of its own.

A job is a dictionary such as {"model": DIR, "prompts": [[1, 5]], "max_tokens": 8}. Its other keys
are arguments of `vllm.LLM`, but for five: "adapter", the folder of a LoRA adapter; "held",
"counted" and "formats", true or false; and "data_parallel_size", which takes as many processes. A
prompt with a picture is {"ids": [1, 5], "picture": FILE, "modality": "image"}.

The answers to a job are a list with a dictionary for each prompt:
    prompt: its token ids, with as many placeholders as the picture takes
    tokens, logprobs: what was generated
    cached: how many of the prompt's tokens were in the prefix cache
    fault: the error that ended the answer early, or None
    drafted: how many draft tokens the whole job proposed, and how many of them were accepted
    held: if the job asks for it, how many experts of a layer each worker holds, and how many rows
        of each expert
    counted: if the job asks for it, how many pairs of a token and an expert each of the worker's
        layers computed
    formats: if the job asks for it, the format of each layer of experts in the engine
"""

import gc
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any

from tests.e2e.warm_process import ROOT, fork

TINY = ROOT / "examples" / "models" / "tiny-moe"
# Where processes are not what is tested: the engine computes in the process that asks it.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

# Small enough for a test machine; every test may replace them.
DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
}


Job = dict[str, Any]
Answers = list[dict[str, Any]]
Model = tuple[Path, Path, dict[str, Any]]
"""A checkpoint, its values for the reference, and arguments of `vllm.LLM`."""


def generate(
    jobs: list[Job],
    enabled: bool = True,
    environment: dict[str, str] | None = None,
    logged: str = "",
    together: bool = False,
) -> list[Answers]:
    """Run each of `jobs` in a process of its own, or all of them `together` in one.

    LvLLM's switch is set as `enabled` says. `logged` is a regular expression, which must match what
    the processes print.
    """
    results = []
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.NamedTemporaryFile("w+") as result:
        for group in [jobs] if together else [[job] for job in jobs]:
            call(_run_all, group, result.name, log=log, enabled=enabled, environment=environment)
            results += json.loads(Path(result.name).read_text())
        said = Path(log.name).read_text()
    # Which engine ran is part of what is tested: a plugin that never loads must not pass.
    assert ("LvLLM: experts on lk" in said) == enabled
    assert re.search(logged, said), said[-8000:]
    return results


def call(
    function: Callable[..., None],
    *arguments: Any,
    log: IO[Any],
    enabled: bool = True,
    environment: dict[str, str] | None = None,
) -> None:
    """Call `function` in a process of its own, which writes into `log`.

    Raises RuntimeError with the end of the log if the process fails.
    """
    # Asked for log-probabilities, vLLM compiles a small function: 10 s of g++ that change nothing.
    defaults = {"LVLLM_MOE_NUMA_ENABLED": str(int(enabled)), "TORCHDYNAMO_DISABLE": "1"}
    variables = os.environ | defaults | (environment or {})
    process = fork(function, *arguments, environment=variables, stdout=log)
    try:
        code = process.wait(900)
    finally:
        process.kill()
    if code:
        raise RuntimeError(f"exit code {code}:\n{Path(log.name).read_text()[-8000:]}")


def generate_all(
    models: dict[str, Model], asked: list[Any], **job: Any
) -> dict[str, tuple[Path, list[Any], Answers]]:
    """Every model's answers to `asked`, with the values for `check_against_reference`.

    `job` holds for all models.
    """
    jobs = [
        {"model": str(folder), "prompts": asked} | more | job for folder, _, more in models.values()
    ]
    answers = generate(jobs, environment=ONE_PROCESS)
    return {
        name: (values, asked, answer)
        for (name, (_, values, _)), answer in zip(models.items(), answers, strict=True)
    }


def run(job: Job) -> Answers:
    """One job, in this process or, with data parallelism, in several."""
    if (replicas := job.pop("data_parallel_size", 1)) > 1:
        return _run_replicas(job, replicas)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts, max_tokens = job.pop("prompts"), job.pop("max_tokens")
    adapter, held = job.pop("adapter", None), job.pop("held", False)
    formats, counted = job.pop("formats", False), job.pop("counted", False)
    llm = LLM(**{**DEFAULTS, "disable_log_stats": "speculative_config" not in job, **job})
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False
    )
    if counted:
        llm.collective_rpc(_count)
    outputs = llm.generate(
        [_prompt(prompt) for prompt in prompts],
        sampling,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    of_job = {
        "drafted": _drafted(llm),
        "held": llm.collective_rpc(_held) if held else [],
        "counted": llm.collective_rpc(_counted) if counted else [],
        "formats": llm.collective_rpc(_formats)[0] if formats else {},
    }
    answers: Answers = []
    for output in outputs:
        tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        chosen = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
        ids = list(output.prompt_token_ids)
        answer = {"prompt": ids, "tokens": tokens, "logprobs": chosen}
        more = {"cached": output.num_cached_tokens, "fault": output.outputs[0].stop_reason}
        answers.append(answer | more | of_job)
    return answers


def _drafted(llm: Any) -> list[int]:
    """Tokens that were proposed, and those accepted."""
    if not llm.llm_engine.log_stats:
        return []
    counters = {metric.name: metric for metric in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    return [counters[f"vllm:spec_decode_{name}"].value for name in names]


def _held(worker: Any) -> list[int]:
    """In a worker: experts of its last layer that has some, and rows of down_proj's input."""
    layers = list(_layers(worker).values())
    return [layers[-1].local_num_experts, layers[-1].intermediate_size_per_partition]


def _count(worker: Any) -> None:
    """In a worker: count the experts from now on, in all replicas."""
    import torch
    from vllm.distributed import get_dp_group

    from lvllm.engine import counters

    for layer in _layers(worker).values():
        layer.pairs = torch.zeros(counters.size(layer.local_num_experts), dtype=torch.int64)
        counters.count(layer.engine_handle, layer.pairs)
    get_dp_group().barrier()


def _counted(worker: Any) -> list[int]:
    """In a worker: the pairs of a token and an expert that each layer has computed."""
    from lvllm.engine.counters import TOKENS_OF_EXPERTS

    return [int(layer.pairs[TOKENS_OF_EXPERTS:].sum()) for layer in _layers(worker).values()]


def _formats(worker: Any) -> dict[str, str]:
    """In a worker: the engine's formats by the names of layers."""
    return {name: layer.engine.format for name, layer in _layers(worker).items()}


def _layers(worker: Any) -> dict[str, Any]:
    """The worker's layers of experts that are in the engine, by name."""
    from lvllm.engine import ExpertLayer

    return {
        layer.layer_name: layer
        for layer in worker.model_runner.get_model().modules()
        if isinstance(getattr(layer, "engine", None), ExpertLayer)
    }


def _run_replicas(job: Job, replicas: int) -> Answers:
    """A job with data parallelism: each replica answers its share of the prompts."""
    from vllm.utils.network_utils import get_open_port

    prompts, port = job["prompts"], get_open_port()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(replicas, mp_context=context) as pool:
        shares = [
            pool.submit(
                _run_replica, job | {"prompts": prompts[rank::replicas]}, rank, port, replicas
            )
            for rank in range(replicas)
        ]
        answered = [share.result() for share in shares]
    return [answered[i % replicas][i // replicas] for i in range(len(prompts))]


def _run_replica(job: Job, rank: int, port: int, replicas: int) -> Answers:
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ |= {
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_SIZE": str(replicas),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(port),
    }
    answers = run(job | {"distributed_executor_backend": "uni"})
    cleanup_dist_env_and_memory()
    return answers


def _prompt(prompt: list[int] | dict[str, Any]) -> dict[str, Any]:
    """vLLM's form of a prompt."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    from PIL import Image

    picture: Any = Image.open(prompt["picture"]).convert("RGB")
    if prompt["modality"] == "vision_chunk":  # a picture, or some frames of a video
        picture = {"type": "image", "image": picture, "uuid": None}
    return {"prompt_token_ids": prompt["ids"], "multi_modal_data": {prompt["modality"]: picture}}


def _run_all(jobs: list[Job], result: str) -> None:
    """In a forked process: run one job after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    if len(jobs) == 1:
        # The process ends with its engine, which need not collect all garbage before.
        gc.unfreeze = lambda: None
    answers = []
    for job in jobs:
        answers.append(run(job))
        if len(jobs) > 1:
            cleanup_dist_env_and_memory()
    Path(result).write_text(json.dumps(answers))
