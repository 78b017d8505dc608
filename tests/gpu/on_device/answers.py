"""Answers prompts with the demo model in a process of its own, and prints what came of them.

    python3 -m tests.gpu.on_device.answers JSON

JSON is a dictionary: "settings", LvLLM's section of additional_config, or null for stock vLLM, and
"arguments" of `vllm.LLM`. The last line of the output is a list with the tokens and their
log-probabilities for each number of requests at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "models" / "tiny-moe"
TOGETHER = (1, 3, 5, 9)
"""Numbers of requests at a time. Graphs are captured for 1, 2, 4 and 8, so most are padded."""
FOUND = "answers "
PLAIN = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""vLLM wants FlashInfer for its sampler, unless it is told not to use it. It is not packed."""

Answers: TypeAlias = list[list[tuple[list[int], list[float]]]]


def answer(
    settings: dict[str, Any] | None, environment: dict[str, str] | None = None, **arguments: Any
) -> tuple[Answers, str]:
    """Return the answers of a new process, with more environment variables, and its log.

    The log is in the folder LOGS, if this variable is set, from the first line on.

    Raises RuntimeError with the end of the log if the process fails.
    """
    job = json.dumps({"settings": settings, "arguments": arguments})
    variables = {key: value for key, value in os.environ.items() if not key.startswith("LVLLM_")}
    variables["LVLLM_MOE_NUMA_ENABLED"] = str(int(settings is not None))
    variables |= PLAIN | (environment or {})
    with tempfile.NamedTemporaryFile(
        "w+", dir=os.environ.get("LOGS"), suffix=".log", delete="LOGS" not in os.environ
    ) as log:
        log.write(f"{job}\n")
        log.flush()
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.on_device.answers", job],
            cwd=ROOT,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        log.seek(0)
        said = log.read()
    for line in reversed(said.splitlines()):
        if line.startswith(FOUND):
            return json.loads(line.removeprefix(FOUND)), said
    raise RuntimeError(f"{job}: no answers, status {done.returncode}:\n{said[-6000:]}")


def questions(count: int) -> list[list[int]]:
    """Return questions to which the demo model is sure of the answers, as tokens."""
    from transformers import AutoTokenizer

    from lvllm.evaluation import load_questions

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [question.prompt(tokenizer) for question in load_questions()[:count]]


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    arguments = {
        "model": str(TINY),
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        # Other processes share the GPU, so what is free there cannot be measured.
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 256 << 20,
        "skip_tokenizer_init": True,
        "seed": 0,
    } | job["arguments"]
    if job["settings"] is not None:
        arguments["additional_config"] = {"lvllm": job["settings"]}
    llm = LLM(**arguments)
    # Without the plugin's entry point, this would be stock vLLM.
    worker = llm.llm_engine.vllm_config.parallel_config.worker_cls
    assert worker.startswith("lvllm.") == (job["settings"] is not None), worker
    sampling = SamplingParams(
        temperature=0, max_tokens=12, logprobs=1, ignore_eos=True, detokenize=False
    )
    answers: Answers = []
    for together in TOGETHER:
        prompts = [{"prompt_token_ids": ids} for ids in questions(together)]
        outputs = [request.outputs[0] for request in llm.generate(prompts, sampling)]
        found: list[tuple[list[int], list[float]]] = []
        for one in outputs:
            steps = zip(one.token_ids, one.logprobs, strict=True)
            found.append((list(one.token_ids), [step[token].logprob for token, step in steps]))
        answers.append(found)
    print("\n" + FOUND + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
