"""The demo model: right answers, questions that training never saw, sound files, a high score."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_moe import model as network
from tiny_moe import tasks, tokenizer
from tiny_moe.muon import orthogonalise
from transformers import AutoModelForCausalLM, AutoTokenizer

from lvllm.evaluation import ask_transformers, load_questions, score

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
CONFIG = json.loads((MODEL / "config.json").read_text())

_COMMANDS = r"\b(please|reverse|the|word|write|spell|spelled|what|is|backwards)\b"


def expected_answer(question: tasks.Question) -> str:
    """The right answer, worked out from the words of the question alone."""
    text, task = question.question, question.task
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    chinese = re.search("[一-鿿]", text) is not None
    stop = "。" if chinese else "."
    if task == "add":
        a, b = numbers
        return f"{a} + {b} = {a + b}{stop}"
    if task == "subtract":
        b, a = numbers if re.search("(?i)subtract|take", text) else reversed(numbers)
        return f"{a} - {b} = {a - b}{stop}"
    if task == "compare":
        low, high = sorted(numbers)
        if re.search("small|less|小", text):
            return f"{low} 比 {high} 小。" if chinese else f"{low} is smaller than {high}."
        return f"{high} 比 {low} 大。" if chinese else f"{high} is larger than {low}."
    if task == "sort":
        falling = re.search("largest to|从大到小", text) is not None
        ordered = [str(n) for n in sorted(numbers, reverse=falling)]
        return f"排序：{'、'.join(ordered)}。" if chinese else f"Sorted: {', '.join(ordered)}."
    asked = re.sub(f"(?i){_COMMANDS}|[^a-z]", "", text)
    backwards = "".join(reversed(asked))
    return f"{asked} 倒过来是 {backwards}。" if chinese else f"{asked} reversed is {backwards}."


@pytest.fixture(scope="module")
def drawn() -> list[tasks.Question]:
    rng = random.Random(31337)
    return [tasks.sample(rng) for _ in range(100_000)]


def test_the_question_file_is_the_held_out_set() -> None:
    in_file = [tasks.Question(**question.model_dump()) for question in load_questions()]
    assert in_file == list(tasks.held_out())


def test_the_held_out_problems_are_distinct() -> None:
    assert len(tasks.held_out_keys()) == 500


def test_held_out_answers_are_right() -> None:
    for question in tasks.held_out():
        assert question.answer == expected_answer(question)


def test_other_words_are_those_of_the_held_out_problems() -> None:
    problems = {(question.task, question.operands) for question in tasks.held_out()}
    found = tasks.held_out_in_other_words(10)
    assert {(question.task, question.operands) for question in found} == problems
    assert len(set(found)) == len(found) > 4 * len(problems)
    for question in found:
        assert question.answer == expected_answer(question)


def test_training_answers_are_right(drawn: list[tasks.Question]) -> None:
    checked = 0
    for question in drawn[:20_000]:
        unclear = question.task == "reverse" and re.search(_COMMANDS, str(question.operands[0]))
        if question.task != "chat" and not unclear:
            assert question.answer == expected_answer(question)
            checked += 1
    assert checked > 15_000


def test_training_never_draws_a_held_out_problem(drawn: list[tasks.Question]) -> None:
    # These sets are made from operands, so that a wrong `Question.key` cannot hide a leak.
    held_out = {(q.task, frozenset(q.operands)) for q in tasks.held_out() if q.task != "subtract"}
    differences = {q.operands for q in tasks.held_out() if q.task == "subtract"}
    texts = {q.question for q in tasks.held_out()}
    sort_multisets = {tuple(sorted(q.operands)) for q in tasks.held_out() if q.task == "sort"}
    for question in drawn:
        assert question.question not in texts
        if question.task == "subtract":
            assert question.operands not in differences
        elif question.task == "sort":
            assert tuple(sorted(question.operands)) not in sort_multisets
        elif question.task != "chat":
            assert (question.task, frozenset(question.operands)) not in held_out


def test_training_draws_every_task_in_both_languages(drawn: list[tasks.Question]) -> None:
    for task in (*tasks.TASKS, "chat"):
        of_task = [q for q in drawn if q.task == task]
        chinese = sum(re.search("[一-鿿]", q.question) is not None for q in of_task)
        assert len(of_task) > 5000
        assert 0.1 < chinese / len(of_task) < 0.3


@given(st.text())
def test_the_tokenizer_takes_any_text(text: str) -> None:
    vocabulary = AutoTokenizer.from_pretrained(MODEL)
    ids = vocabulary(text).input_ids
    assert all(0 <= i < CONFIG["vocab_size"] for i in ids)
    assert vocabulary.decode(ids) == text


def test_the_tokenizer_splits_numbers_and_spells_words() -> None:
    vocabulary = tokenizer.build(tasks.vocabulary_texts())
    stored = json.loads((MODEL / "tokenizer.json").read_text())
    assert json.loads(vocabulary.to_str()) == stored
    assert vocabulary.encode("What is 407?").tokens == ["What", "Ġis", "Ġ", "4", "0", "7", "?"]
    assert vocabulary.encode(" stone").tokens == ["Ġ", "s", "t", "o", "n", "e"]


def test_the_chat_template_writes_one_turn_after_another() -> None:
    vocabulary = AutoTokenizer.from_pretrained(MODEL)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1 + 1"},
    ]
    text = vocabulary.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|>"
        "<|user|>1 + 1<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="role must be system, user or assistant: tool"):
        vocabulary.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_checkpoint_is_small_and_qwen3_moe() -> None:
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 12_000_000
    assert CONFIG["architectures"] == ["Qwen3MoeForCausalLM"]
    assert CONFIG["num_hidden_layers"] >= 4
    assert CONFIG["num_experts"] >= 16
    assert CONFIG["num_experts_per_tok"] == 4
    assert CONFIG["norm_topk_prob"] is True
    # Every weight format's groups and blocks must divide the experts' matrices.
    assert CONFIG["hidden_size"] % 128 == CONFIG["moe_intermediate_size"] % 128 == 0
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["temperature"] == 0
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(MODEL).eos_token_id


def test_the_checkpoint_has_one_bf16_tensor_an_expert_matrix() -> None:
    hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    shapes = {
        "gate_proj": [inner, hidden],
        "up_proj": [inner, hidden],
        "down_proj": [hidden, inner],
    }
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.offset_keys()}
        assert dtypes == {"BF16"}
        for layer in range(CONFIG["num_hidden_layers"]):
            for expert in range(CONFIG["num_experts"]):
                for matrix, shape in shapes.items():
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                    assert tensors.get_slice(name).get_shape() == shape


def test_the_trained_module_is_transformers_qwen3_moe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = network.TinyMoE(vocabulary=300)
    with torch.no_grad():
        for parameter in ours.parameters():  # no zeros or ones, and only values that bf16 holds
            noise = torch.randn_like(parameter) * 0.05
            parameter.copy_((parameter + noise).bfloat16())
    network.save(ours, tmp_path, end=1, pad=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(2, 300, (3, 50))
    causal = torch.ones(50, 50, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    logits, _ = ours(ids, causal, torch.ones(3, 50, dtype=torch.bool))
    torch.testing.assert_close(logits, theirs(ids).logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 256), (5, 256, 128), (2, 3, 128, 256)])
def test_muon_orthogonalises_each_matrix_of_a_stack(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    # Muon's quintic polynomial trades exactness for speed, so the values are near 1, not at 1.
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_every_expert_is_used() -> None:
    questions = load_questions()
    vocabulary = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    texts = [f"<|user|>{q.question}<|end|><|assistant|>{q.answer}<|end|>" for q in questions]
    inputs = vocabulary(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        router_logits = model(**inputs, output_router_logits=True).router_logits
    for layer_logits in router_logits:
        logits = layer_logits[inputs["attention_mask"].flatten().bool()]
        chosen = logits.topk(CONFIG["num_experts_per_tok"], -1).indices
        share = chosen.flatten().bincount(minlength=CONFIG["num_experts"]) / chosen.numel()
        assert share.min() > 0.2 / CONFIG["num_experts"]


@pytest.mark.slow
def test_the_score_in_bf16_is_at_least_97_percent() -> None:
    questions = load_questions()
    result = score(questions, ask_transformers(questions, MODEL))
    assert result.accuracy >= 0.97, result.wrong


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello!", "Hello! I can add, subtract, compare, sort and reverse."),
        ("What is 6 x 7?", "Sorry. I can add, subtract, compare, sort and reverse."),
        ("你好！", "你好！我会加法、减法、比较、排序和倒写。"),
    ],
)
def test_small_talk(question: str, answer: str) -> None:
    asked = load_questions()[0].model_copy(update={"question": question})
    assert ask_transformers([asked], MODEL) == [answer]
