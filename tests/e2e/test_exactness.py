"""Greedy decoding through LvLLM against transformers in float32.

The reference runs teacher-forced over LvLLM's own tokens. At every step two things are compared:
the log-probability of the chosen token, and the token with the reference's own choice. Random
models have near-ties, and bfloat16 has 8 bits: where two experts' scores are closer than that,
one step (and through the context a few more) may go to another expert. So four steps in five must
be within BOUND, the typical step within TYPICAL; dropping the experts breaks both.
"""

import random
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import transformers

from lvllm.evaluation import load_questions
from tests.e2e import reference
from tests.e2e.generate import ONE_PROCESS, TINY, Answers, generate
from tests.models.make import ARCHITECTURES, VOCABULARY, make

# In log-probability. Medians seen are 0.003 to 0.008; transformers in bfloat16 errs by as much.
TYPICAL = 0.03
BOUND = 0.1


Prompts = list[list[int]]


def prompts(seed: int) -> Prompts:
    """Prompts of odd and even lengths, so that prefill and decode see awkward batches."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 7, 16, 33)]


def differences(model: Any, asked: Prompts, answers: Answers) -> tuple[list[float], list[float]]:
    """By step: the error of the chosen token's log-probability, and how far it is from the best."""
    errors, gaps = [], []
    for prompt, answer in zip(asked, answers, strict=True):
        expected = reference.logprobs(model, prompt, answer["tokens"])
        for row, token, got in zip(expected, answer["tokens"], answer["logprobs"], strict=True):
            errors.append(abs(got - row[token].item()))
            gaps.append((row.max() - row[token]).item())
    return errors, gaps


def share(values: list[float], most: float) -> float:
    """The share of values of at most `most`."""
    return sum(value <= most for value in values) / len(values)


def check_against_reference(folder: Path, asked: Prompts, answers: Answers) -> None:
    model = reference.load(folder)
    errors, gaps = differences(model, asked, answers)
    print(f"{folder.name}: {median(errors)=:.4f} {max(errors)=:.4f} {share(gaps, 0)=:.3f}")
    assert median(errors) <= TYPICAL
    assert share(errors, BOUND) >= 0.8
    # A token that is not the reference's choice ties with it within both errors.
    assert share(gaps, 2 * BOUND) >= 0.8
    assert share(gaps, 0) >= 0.8

    errors, _ = differences(reference.without_experts(model), asked, answers)
    assert median(errors) > 3 * TYPICAL, "a comparison that does not notice missing experts"


def chats() -> Prompts:
    """Every tenth held-out question, as the demo model's chat template writes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return [
        tokenizer.apply_chat_template(q.messages, add_generation_prompt=True)["input_ids"]
        for q in load_questions()[::10]
    ]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Prompts, Answers]]:
    """Every architecture's answers, from one process: starting vLLM is most of the time."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    folders = {
        name: make(name, tmp_path_factory.mktemp("models") / name, seed) for name in ARCHITECTURES
    }
    drawn = prompts(seed)
    cases = {name: (folder, drawn) for name, folder in folders.items()} | {"tiny": (TINY, chats())}
    jobs = [
        {"model": str(folder), "prompts": asked, "max_tokens": 36 if folder == TINY else 12}
        for folder, asked in cases.values()
    ]
    answers = generate(jobs, environment=ONE_PROCESS)
    return {
        name: (*case, answer) for (name, case), answer in zip(cases.items(), answers, strict=True)
    }


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_random_models(architecture: str, generated: dict[str, Any]) -> None:
    check_against_reference(*generated[architecture])


def test_the_demo_model_gives_the_references_tokens(generated: dict[str, Any]) -> None:
    """Token for token, but where the model wavers: a subtraction that it never learnt may be a tie
    between two digits (0.004 seen), and bfloat16 decides it.
    """
    folder, asked, answers = generated["tiny"]
    model = reference.load(folder)
    end = model.generation_config.eos_token_id
    same = 0
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = answer["tokens"]
        expected = reference.logprobs(model, prompt, tokens)
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        best = expected.argmax(dim=-1).tolist()
        different = [i for i in range(length) if tokens[i] != best[i]]
        same += not different
        for i in different[:1]:  # behind it the two go on from different texts
            assert (expected[i].max() - expected[i][tokens[i]]).item() <= TYPICAL
    assert same >= len(asked) - 2
