"""Greedy generation through vLLM in a process of its own.

    python -m tests.e2e.generate RESULT.json JOBS

JOBS is a JSON list such as [{"model": DIR, "prompts": [[1, 5]], "max_tokens": 8}]; other keys of
a job are arguments of `vllm.LLM`, but for "adapter", the folder of a LoRA adapter, "held", true or
false, and "data_parallel_size", which takes as many processes. A prompt with a picture is
{"ids": [1, 5], "picture": FILE, "modality": "image"}. The result has one list a job, with one
{"prompt": [...], "tokens": [...], "logprobs": [...]} a prompt; "prompt" has as many placeholders as
the picture takes. Beside them are "cached", how many of its tokens were in the prefix cache;
"fault", what ended it before its time; and of the whole job "drafted", tokens that were proposed
and those of them accepted, and "held", if asked for: of each worker how many experts of a layer it
holds, and how many rows of each.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "models" / "tiny-moe"
# Where processes are not what is tested, starting without an engine's own takes half the time, and
# one process can load one model after the other.
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
) -> list[Answers]:
    """Run `jobs` one after the other in a fresh process, LvLLM's switch set as `enabled`. What it
    prints has `logged` in it, a regular expression.
    """
    # Asked for log-probabilities, vLLM compiles a small function: 10 s of g++ that change nothing.
    defaults = {"LVLLM_MOE_NUMA_ENABLED": str(int(enabled)), "TORCHDYNAMO_DISABLE": "1"}
    env = os.environ | defaults | (environment or {})
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        process = subprocess.run(
            [sys.executable, "-m", "tests.e2e.generate", result.name, json.dumps(jobs)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        if process.returncode:
            raise RuntimeError(f"generation failed:\n{process.stdout[-8000:]}")
        # Which engine ran is part of what is tested: a plugin that never loads must not pass.
        assert ("LvLLM: experts on lk" in process.stdout) == enabled
        assert re.search(logged, process.stdout), process.stdout[-8000:]
        return json.load(result)


def generate_all(
    models: dict[str, Model], asked: list[Any], **job: Any
) -> dict[str, tuple[Path, list[Any], Answers]]:
    """Every model's answers to `asked`, from one process: starting vLLM is most of the time.

    With the values, for `check_against_reference`. `job` holds for all models.
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
    llm = LLM(**{**DEFAULTS, "disable_log_stats": "speculative_config" not in job, **job})
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [_prompt(prompt) for prompt in prompts],
        sampling,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    of_job = {"drafted": _drafted(llm), "held": llm.collective_rpc(_held) if held else []}
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
    from lvllm.engine import ExpertLayer

    layers = [
        layer
        for layer in worker.model_runner.get_model().modules()
        if isinstance(getattr(layer, "engine", None), ExpertLayer)
    ]
    return [layers[-1].local_num_experts, layers[-1].intermediate_size_per_partition]


def _run_replicas(job: Job, replicas: int) -> Answers:
    """A job with data parallelism: each replica answers its share of the prompts."""
    from vllm.utils.network_utils import get_open_port

    prompts, port = job["prompts"], get_open_port()
    with ProcessPoolExecutor(replicas, mp_context=_imported()) as pool:
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


def _imported() -> Any:
    """Processes from one that has imported what they need: 3 s instead of 15 each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.v1.executor.multiproc_executor", "vllm.entrypoints.llm"])
    return context


def _inspect_models_here() -> None:
    """vLLM asks about each class of model in a process of its own, lest CUDA be started, and keeps
    the answer below ~/.cache. Where that is empty, a list of 20 architectures takes 3 minutes more.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def main() -> None:
    """Child process."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.executor import multiproc_executor

    if ONE_PROCESS.items() <= os.environ.items():
        multiproc_executor.get_mp_context = _imported
        _inspect_models_here()
    results = []
    for job in json.loads(sys.argv[2]):
        results.append(run(job))
        cleanup_dist_env_and_memory()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
