"""What LVLLM_DEFER_EXPERTS costs in quality, beside what it costs to leave these experts out.

    python -m benchmarks.deferred_quality [MODEL]

The model, by default examples/models/tiny-moe, answers its questions and reads them with their
right answers, through vLLM with experts beside the stand-in accelerator. Each step has at most 8
tokens, of prompts as well as of answers, so every token is computed with deferred experts. That is
the most that they can cost: a server defers none in the longer batches of prompts. The first row
defers none, and the KL divergence is taken from it.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from lvllm.evaluation import load_questions, report, score
from lvllm.evaluation.answers import ask_vllm
from lvllm.evaluation.likelihood import compare
from lvllm.evaluation.logprobs import logprobs_from_vllm
from lvllm.evaluation.models import LocalModel
from lvllm.evaluation.passages import of_chats
from lvllm.evaluation.processes import Outcome, Work, run_in_new_process
from lvllm.gpu.hybrid import DEFERRING_TOKENS

MODEL = Path(__file__).parents[1] / "examples/models/tiny-moe"
KV_BYTES = 256 << 20


@dataclass(frozen=True)
class Variant:
    """How many of a token's experts are deferred, or left out."""

    deferred: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        how, count = ("left out", self.left_out) if self.left_out else ("deferred", self.deferred)
        return f"{count} {how}"


def run(model: str, variant: Variant, chosen: int, work: Work) -> Outcome:
    """Do the work with a variant of a model whose tokens take `chosen` experts, in this process."""
    os.environ |= {
        "LVLLM_MOE_NUMA_ENABLED": "1",
        "LVLLM_ACCELERATOR": "host",
        "LVLLM_DEFER_EXPERTS": str(variant.deferred),
    }
    from vllm import LLM

    assert work.passages is not None
    llm = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=DEFERRING_TOKENS,
        max_num_batched_tokens=DEFERRING_TOKENS,
        max_logprobs=-1,
        hf_overrides={"num_experts_per_tok": chosen - variant.left_out},
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers = ask_vllm(work.questions, llm)
    return Outcome(answers, logprobs_from_vllm(work.passages, llm, work.top, name=str(variant)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    model = LocalModel(parser.parse_args().model, "bfloat16", "model", lvllm=True)
    chosen = int(model.config()["num_experts_per_tok"])
    questions = load_questions()
    work = Work(questions, of_chats(questions, model.tokenizer()), 512)
    counts = range(1, chosen)
    variants = [Variant(), *map(Variant, counts), *(Variant(left_out=count) for count in counts)]
    rows: list[report.Row] = []
    for variant in variants:
        outcome = run_in_new_process(str(variant), run, model.folder, variant, chosen, work)
        read = outcome.likelihoods
        assert read is not None
        compared = compare(rows[0].likelihoods, read) if rows and rows[0].likelihoods else None
        result = score(questions, outcome.answers)
        rows.append(report.Row(str(variant), None, result, read, compared))
    source = work.passages.source if work.passages else ""
    print(report.markdown(rows, report.notes(rows, source, str(variants[0]))))


if __name__ == "__main__":
    main()
