"""Compute answers in this program, without a server: `LLM.generate` and `LLM.chat`.

python examples/offline/generate.py [MODEL]
"""

import os
import sys
from pathlib import Path

# LvLLM is loaded with vLLM, so its switch has to be on before the import.
os.environ["LVLLM_MOE_NUMA_ENABLED"] = "1"

from vllm import LLM, SamplingParams

DEMO = Path(__file__).parents[1] / "models" / "tiny-moe"


def main() -> None:
    llm = LLM(
        model=sys.argv[1] if len(sys.argv) > 1 else str(DEMO),
        dtype="bfloat16",
        max_model_len=512,
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,  # this starts at once; without it, functions are compiled before
    )
    sampling = SamplingParams(temperature=0, max_tokens=64)

    # `generate` takes texts as the model reads them, here in the demo model's own format.
    texts = ["<|user|>What is 47 + 38?<|end|><|assistant|>"]
    for completion in llm.generate(texts, sampling):
        print("generate:", completion.outputs[0].text)

    # `chat` takes conversations, and the model's chat template makes texts of them.
    conversations = [
        [{"role": "user", "content": "What is 90 - 41?"}],
        [{"role": "user", "content": "Spell stone backwards."}],
    ]
    for completion in llm.chat(conversations, sampling):
        print("chat:", completion.outputs[0].text)


# vLLM starts processes that import this file, so only the first one may call `main`.
if __name__ == "__main__":
    main()
