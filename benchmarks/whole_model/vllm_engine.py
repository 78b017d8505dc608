"""Measure one vLLM in a process of its own: python -m benchmarks.whole_model.vllm_engine JSON F.

The environment says whether it is LvLLM or stock vLLM. It writes F as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the seconds of a prefill, and those of a decoding step for each number of users."""
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(sys.argv[1])
    prompt, users, steps = asked["prompt"], asked["users"], asked["steps"]
    # The arguments are those of config.yaml, as far as they matter here.
    llm = LLM(
        asked["folder"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=prompt + 128,
        max_num_seqs=max(users),
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        compilation_config={"mode": asked["compilation"]},
        enable_prefix_caching=True,
        seed=0,
    )
    fresh = 0

    def generate(prefix: list[int], count: int, tokens: int) -> float:
        prompts: Any = [{"prompt_token_ids": [*prefix, 100 + i]} for i in range(count)]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logit_bias={100 + i: 100},
            )
            for i in range(count)
        ]
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def new_prompt() -> list[int]:
        nonlocal fresh
        fresh += 1
        return [1000 * fresh + i % 997 for i in range(prompt - 1)]

    generate(new_prompt(), 1, 2)
    prefill = min(generate(new_prompt(), 1, 1) for _ in range(asked["repeat"]))
    shared = new_prompt()
    generate(shared, 1, 1)
    decode = {}
    for count in users:
        generate(shared, count, steps)
        seconds = [
            generate(shared, count, 2 * steps) - generate(shared, count, steps)
            for _ in range(asked["repeat"])
        ]
        decode[count] = min(seconds) / steps
    Path(sys.argv[2]).write_text(json.dumps({"prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
