"""Measure llama.cpp in a process of its own: python -m benchmarks.whole_model.llama_engine JSON F.

It needs llama-cpp-python alone. It writes F as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as ll  # type: ignore[import-not-found]
import numpy as np


class Llama:
    """A model and a context for several sequences."""

    def __init__(self, path: str, threads: int, prompt: int, sequences: int) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        options = ll.llama_context_default_params()
        options.n_ctx = prompt + 256 * sequences
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True  # so that sequences share the prompt's keys and values
        self.context = ll.llama_init_from_model(self.model, options)
        self.memory = ll.llama_get_memory(self.context)
        self.batch = ll.llama_batch_init(512, 0, 1)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))

    def compute(self, tokens: list[tuple[int, int, int]], wanted: int) -> None:
        """Compute (token, position, sequence) at once, with logits of the last `wanted`."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i >= len(tokens) - wanted
        if ll.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def best(self, index: int) -> int:
        """The most likely token after token `index` of the last batch."""
        logits = ll.llama_get_logits_ith(self.context, index)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocabulary))
        return int(np.frombuffer(values.contents, np.float32).argmax())

    def prefill(self, prompt: int) -> float:
        """Seconds for a prompt in sequence 0, which was empty, up to its first token."""
        ll.llama_memory_clear(self.memory, True)
        begin = time.perf_counter()
        for first in range(0, prompt, 512):
            part = [(1000 + i % 997, i, 0) for i in range(first, min(first + 512, prompt))]
            self.compute(part, 1 if first + 512 >= prompt else 0)
        self.best(-1)
        return time.perf_counter() - begin

    def decode(self, users: int, prompt: int, steps: int) -> float:
        """Seconds of a step in which each of `users` sequences gets a token after the prompt."""
        for sequence in range(1, users):
            ll.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        tokens = [100 + i for i in range(users)]
        begin = time.perf_counter()
        for step in range(steps):
            batch = [(token, prompt + step, i) for i, token in enumerate(tokens)]
            self.compute(batch, users)
            for i in range(users):
                self.best(i)
        seconds = (time.perf_counter() - begin) / steps
        for sequence in range(users):
            ll.llama_memory_seq_rm(self.memory, sequence, prompt if sequence == 0 else -1, -1)
        return seconds


def main() -> None:
    """Write the seconds of a prefill, and those of a decoding step for each number of users."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    prompt, users, steps = asked["prompt"], asked["users"], asked["steps"]
    llama = Llama(asked["gguf"], asked["threads"], prompt, max(users))
    prefill = min(llama.prefill(prompt) for _ in range(1 + asked["repeat"]))
    decode = {
        count: min(llama.decode(count, prompt, steps) for _ in range(1 + asked["repeat"]))
        for count in users
    }
    Path(sys.argv[2]).write_text(json.dumps({"prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
