"""Three ways to put the questions to a model. Each returns the answers in the same order.

Decoding is greedy everywhere, so that one set of weights has one score.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvllm.evaluation.questions import Question

if TYPE_CHECKING:
    from vllm import LLM

MAX_ANSWER_TOKENS = 64  # the longest right answer of the demo model's questions has 34


class EvaluationError(Exception):
    """The model could not be asked; the message is one line for the user."""


def ask_server(
    questions: Sequence[Question],
    base_url: str,
    *,
    model: str | None = None,
    api_key: str = "EMPTY",
    concurrency: int = 16,
) -> list[str]:
    """Asks an OpenAI-compatible server, `concurrency` questions at a time.

    `base_url` ends in `/v1`; `model` is the served name, by default the server's first. Raises
    EvaluationError if the server cannot be reached or refuses a request.
    """
    import openai

    client = openai.OpenAI(base_url=base_url, api_key=api_key)

    def ask(question: Question) -> str:
        completion = client.chat.completions.create(
            model=name,
            messages=question.messages,  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        return completion.choices[0].message.content or ""

    try:
        name = model or client.models.list().data[0].id
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, questions))
    except openai.APIConnectionError:
        raise EvaluationError(f"no server answers at {base_url}") from None
    except openai.APIError as error:
        raise EvaluationError(f"{base_url} refused a question: {error.message}") from None


def ask_vllm(questions: Sequence[Question], llm: "LLM") -> list[str]:
    """Asks a `vllm.LLM` in this process, all questions in one batch."""
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
    batch_size: int = 100,
) -> list[str]:
    """Asks Hugging Face transformers on the CPU: the reference the other two are held against.

    `model` is a checkpoint directory, `dtype` the name of a torch dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
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
