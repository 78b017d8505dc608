"""Three ways to ask a model questions. Each returns the answers in the order of the questions.

Decoding is always greedy, so that a set of weights has one score.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lvllm.evaluation.connection import openai_client
from lvllm.evaluation.errors import server_errors
from lvllm.evaluation.questions import Question

MAX_ANSWER_TOKENS = 64  # The longest right answer to the demo model's questions has 34.


def ask_server(
    questions: Sequence[Question],
    base_url: str,
    *,
    model: str | None = None,
    api_key: str = "",
    concurrency: int = 16,
) -> list[str]:
    """Ask an OpenAI-compatible server, `concurrency` questions at a time.

    `base_url` ends in `/v1`. `model` is the served name; without it the server's first model
    answers. Raises EvaluationError if the server cannot be reached or refuses a request.
    """
    client = openai_client(base_url, api_key)

    def ask(question: Question) -> str:
        completion = client.chat.completions.create(
            model=name,
            messages=question.messages,  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        return completion.choices[0].message.content or ""

    with server_errors(base_url, "refused a question"):
        name = model or client.models.list().data[0].id
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, questions))


def ask_vllm(questions: Sequence[Question], llm: Any) -> list[str]:
    """Ask a `vllm.LLM` in this process, all questions in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    chats: list[Any] = [question.messages for question in questions]
    outputs = llm.chat(chats, sampling, use_tqdm=sys.stderr.isatty())
    return [output.outputs[0].text for output in outputs]


def ask_transformers(
    questions: Sequence[Question],
    model: Path | str,
    *,
    dtype: str = "bfloat16",
    network: Any = None,
    batch_size: int = 100,
) -> list[str]:
    """Ask Hugging Face transformers on the CPU, the reference for the other two ways.

    `model` is a checkpoint folder, `dtype` the name of a torch dtype, and `network` the model if it
    is loaded already.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = network or AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = tokenizer.apply_chat_template(
            [question.messages for question in questions[start : start + batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = network.generate(**prompts, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        new = output[:, prompts["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers
