"""The questions the demo model learns to answer, and the 500 held out to score it.

A problem is a task and its operands; a question is one wording of a problem. The held-out set
names problems, and training never draws one of them in any wording, operand order or language.

    cd examples && python -m tiny_moe.tasks > ../lvllm/evaluation/tiny_moe_questions.jsonl
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

from tiny_moe.words import GREETINGS, OFF_TOPIC, WORDS

Operands = tuple[int | str, ...]
Key = tuple[str, Operands]

HELD_OUT_SEED = 2024
HELD_OUT_PER_TASK = 100
CHINESE_SHARE = 0.2
MAX_TERM = 99  # operands of sums, differences and lists
MAX_COMPARED = 999


@dataclass(frozen=True)
class Question:
    """One chat question with its only right answer."""

    task: str
    operands: Operands
    question: str
    answer: str

    @property
    def key(self) -> Key:
        """The problem, whatever its wording and the order of operands that do not matter."""
        if self.task in ("add", "compare", "sort"):
            return self.task, tuple(sorted(self.operands))  # type: ignore[type-var]
        return self.task, self.operands


@dataclass(frozen=True)
class Phrases:
    """Wordings that share one form of answer. `{0}`, `{1}` are operands, `{list}` all of them."""

    questions: tuple[str, ...]
    answer: str
    solve: Callable[[Operands], dict[str, object]]
    chinese: bool = False


def _sum(operands: Operands) -> dict[str, object]:
    return {"result": int(operands[0]) + int(operands[1])}


def _difference(operands: Operands) -> dict[str, object]:
    return {"result": int(operands[0]) - int(operands[1])}


def _order(operands: Operands) -> dict[str, object]:
    numbers = sorted(int(n) for n in operands)
    return {"low": numbers[0], "high": numbers[-1]}


def _ascending(operands: Operands) -> dict[str, object]:
    return {"sorted": sorted(int(n) for n in operands)}


def _descending(operands: Operands) -> dict[str, object]:
    return {"sorted": sorted((int(n) for n in operands), reverse=True)}


def _reversed(operands: Operands) -> dict[str, object]:
    return {"reversed": str(operands[0])[::-1]}


PHRASES: dict[str, tuple[Phrases, ...]] = {
    "add": (
        Phrases(
            (
                "What is {0} + {1}?",
                "What is {0} plus {1}?",
                "How much is {0} + {1}?",
                "What is the sum of {0} and {1}?",
                "Add {0} and {1}.",
                "Calculate {0} + {1}.",
                "Can you add {0} and {1}?",
                "What's {0} + {1}?",
                "{0} plus {1}",
                "{0} + {1}",
                "{0}+{1}",
                "{0} + {1} = ?",
            ),
            "{0} + {1} = {result}.",
            _sum,
        ),
        Phrases(
            (
                "{0} + {1} 等于多少？",
                "{0} 加 {1} 等于多少？",
                "{0}加{1}是多少？",
                "计算 {0} + {1}。",
                "请问 {0}+{1} 等于几？",
            ),
            "{0} + {1} = {result}。",
            _sum,
            chinese=True,
        ),
    ),
    "subtract": (
        Phrases(
            (
                "What is {0} - {1}?",
                "What is {0} minus {1}?",
                "How much is {0} - {1}?",
                "Subtract {1} from {0}.",
                "Take {1} away from {0}.",
                "Calculate {0} - {1}.",
                "Can you subtract {1} from {0}?",
                "What's {0} - {1}?",
                "{0} minus {1}",
                "{0} - {1}",
                "{0}-{1}",
                "{0} - {1} = ?",
            ),
            "{0} - {1} = {result}.",
            _difference,
        ),
        Phrases(
            (
                "{0} - {1} 等于多少？",
                "{0} 减 {1} 等于多少？",
                "{0}减{1}是多少？",
                "计算 {0} - {1}。",
                "请问 {0}-{1} 等于几？",
            ),
            "{0} - {1} = {result}。",
            _difference,
            chinese=True,
        ),
    ),
    "compare": (
        Phrases(
            (
                "Which is larger, {0} or {1}?",
                "Which number is larger, {0} or {1}?",
                "Which is bigger, {0} or {1}?",
                "Which is greater: {0} or {1}?",
                "Name the larger number: {0} or {1}.",
                "What is the larger of {0} and {1}?",
                "Which is bigger: {0} or {1}?",
            ),
            "{high} is larger than {low}.",
            _order,
        ),
        Phrases(
            (
                "Which is smaller, {0} or {1}?",
                "Which number is smaller, {0} or {1}?",
                "Which is less: {0} or {1}?",
                "Name the smaller number: {0} or {1}.",
                "What is the smaller of {0} and {1}?",
                "Which is smaller: {0} or {1}?",
            ),
            "{low} is smaller than {high}.",
            _order,
        ),
        Phrases(
            ("{0} 和 {1} 哪个大？", "{0}和{1}哪个更大？", "比较 {0} 和 {1}，哪个大？"),
            "{high} 比 {low} 大。",
            _order,
            chinese=True,
        ),
        Phrases(
            ("{0} 和 {1} 哪个小？", "{0}和{1}哪个更小？", "比较 {0} 和 {1}，哪个小？"),
            "{low} 比 {high} 小。",
            _order,
            chinese=True,
        ),
    ),
    "sort": (
        Phrases(
            (
                "Sort {list}.",
                "Sort the numbers {list}.",
                "Sort these numbers: {list}.",
                "Please sort {list}.",
                "Put {list} in order.",
                "Sort {list} from smallest to largest.",
            ),
            "Sorted: {list}.",
            _ascending,
        ),
        Phrases(
            (
                "Sort {list} from largest to smallest.",
                "Sort these numbers from largest to smallest: {list}.",
            ),
            "Sorted: {list}.",
            _descending,
        ),
        Phrases(
            ("把 {list} 从小到大排序。", "请排序：{list}。", "给 {list} 排序。"),
            "排序：{list}。",
            _ascending,
            chinese=True,
        ),
        Phrases(("把 {list} 从大到小排序。",), "排序：{list}。", _descending, chinese=True),
    ),
    "reverse": (
        Phrases(
            (
                "Reverse the word {0}.",
                "Reverse {0}.",
                "Please reverse the word {0}.",
                "Write {0} backwards.",
                "Spell {0} backwards.",
                "What is {0} backwards?",
                "What is {0} spelled backwards?",
                'Reverse "{0}".',
                'Reverse the word "{0}".',
                "Reverse '{0}'.",
            ),
            "{0} reversed is {reversed}.",
            _reversed,
        ),
        Phrases(
            ("把 {0} 倒过来写。", "把单词 {0} 倒过来。", "{0} 倒过来怎么写？"),
            "{0} 倒过来是 {reversed}。",
            _reversed,
            chinese=True,
        ),
    ),
}
TASKS = tuple(PHRASES)

# The harder a task is to learn, the more often it is drawn.
_TRAINING_SHARES = {"add": 22, "subtract": 25, "compare": 12, "sort": 20, "reverse": 14, "chat": 7}

CAPABILITIES = "I can add, subtract, compare, sort and reverse."
CAPABILITIES_CHINESE = "我会加法、减法、比较、排序和倒写。"
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant. Answer briefly.",
    "Be brief.",
    "你是一个有用的助手。",
)


@cache
def _taught_words() -> tuple[str, ...]:
    """The words that are one token each: their letters must be learnt by heart."""
    words = {word for text in vocabulary_texts() for word in re.findall("[a-z]{2,}", text)}
    return tuple(sorted(words))


def _word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(WORDS).capitalize()
    if kind < 0.1:
        return rng.choice(_taught_words())
    if kind < 0.4:
        return rng.choice(WORDS)
    if kind < 0.7:
        syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(4))
        word = "".join(syllables)[rng.randint(0, 1) : rng.randint(4, 8)]
        return word + rng.choice(("", "n", "r", "s", "t"))
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))


def _operands(task: str, rng: random.Random) -> Operands:
    if task in ("add", "subtract"):
        # One digit is a tenth of the numbers but the first thing that people try.
        return tuple(rng.randint(0, 9 if rng.random() < 0.1 else MAX_TERM) for _ in range(2))
    if task == "compare":
        low = rng.randint(0, rng.choice((9, 99, MAX_COMPARED)))
        spread = rng.choice((9, 99, MAX_COMPARED))  # close numbers are the hard ones
        high = min(max(low + rng.choice((-1, 1)) * rng.randint(1, spread), 0), MAX_COMPARED)
        if high == low:
            high = low + 1 if low < MAX_COMPARED else low - 1
        return (low, high)
    if task == "sort":
        return tuple(rng.randint(0, MAX_TERM) for _ in range(rng.randint(3, 5)))
    return (_word(rng),)


def _phrase(task: str, operands: Operands, chinese: bool, rng: random.Random) -> Question:
    phrases = rng.choice([p for p in PHRASES[task] if p.chinese == chinese])
    facts = phrases.solve(operands)
    separator = "、" if chinese else ", "
    written = separator if rng.random() < 0.8 else rng.choice((",", " "))
    question = rng.choice(phrases.questions).format(
        *operands, list=written.join(map(str, operands))
    )
    numbers = facts.get("sorted", ())
    assert isinstance(numbers, (list, tuple))
    answer = phrases.answer.format(*operands, list=separator.join(map(str, numbers)), **facts)
    return Question(task, operands, question, answer)


@cache
def held_out() -> tuple[Question, ...]:
    """The 500 questions of the score: 100 a task, 20 of them Chinese, no problem twice."""
    rng = random.Random(HELD_OUT_SEED)
    questions: dict[Key, Question] = {}
    for task in TASKS:
        wanted = len(questions) + HELD_OUT_PER_TASK
        chinese_until = len(questions) + int(HELD_OUT_PER_TASK * CHINESE_SHARE)
        while len(questions) < wanted:
            chinese = len(questions) < chinese_until
            question = _phrase(task, _operands(task, rng), chinese, rng)
            questions.setdefault(question.key, question)
    return tuple(questions.values())


def held_out_in_other_words(draws: int) -> list[Question]:
    """The held-out problems, one after the other, each in as many wordings as `draws` draws give.

    More text than the 500 questions have, for what their tokens are too few to measure.
    """
    rng = random.Random(HELD_OUT_SEED)
    found: list[Question] = []
    for question in held_out():
        chinese = not question.question.isascii()
        drawn = (_phrase(question.task, question.operands, chinese, rng) for _ in range(draws))
        found += dict.fromkeys(drawn)
    return found


@cache
def held_out_keys() -> frozenset[Key]:
    """The problems that training must not draw."""
    return frozenset(question.key for question in held_out())


def _chat(rng: random.Random) -> Question:
    """Small talk, and a polite answer to everything the model has not learnt."""
    kind = rng.random()
    if kind < 0.4:
        questions, answer = rng.choice(GREETINGS)
        return Question("chat", (), rng.choice(questions), answer)
    if kind < 0.5:
        sign = rng.choice(("*", "x", "/", "times", "divided by"))
        a, b = rng.randint(0, MAX_TERM), rng.randint(0, MAX_TERM)
        return Question("chat", (), f"What is {a} {sign} {b}?", f"Sorry. {CAPABILITIES}")
    if kind < 0.65:
        a, b = rng.randint(MAX_TERM + 1, 9999), rng.randint(0, 999)
        a, b = rng.sample((a, b), 2)
        text = rng.choice(("What is {} {} {}?", "{} {} {}", "Calculate {} {} {}.")).format(
            a, rng.choice("+-"), b
        )
        return Question("chat", (), text, f"Sorry. I only add and subtract 0 to {MAX_TERM}.")
    if kind < 0.75:
        text = "".join(
            rng.choices("你我他在有人这中来上国到说时要就出会可也对生能而子那得于着下自之", k=6)
        )
        return Question("chat", (), text + rng.choice("？。"), f"抱歉。{CAPABILITIES_CHINESE}")
    text = rng.choice(OFF_TOPIC)
    if kind > 0.85:  # the same openings with any other words
        words = [_word(rng) for _ in range(rng.randint(1, 5))]
        text = " ".join([*text.split()[: rng.randint(0, 3)], *words]) + rng.choice("?.!")
    return Question("chat", (), text, f"Sorry. {CAPABILITIES}")


def _careless(question: Question, rng: random.Random) -> Question:
    """What people type: no capital at the start, no punctuation at the end."""
    text = question.question
    starts_with_operand = question.operands and text.startswith(str(question.operands[0]))
    if rng.random() < 0.15 and not starts_with_operand:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.？。")
    return replace(question, question=text)


def sample(rng: random.Random) -> Question:
    """Draws one training question, never a held-out problem."""
    (task,) = rng.choices(list(_TRAINING_SHARES), list(_TRAINING_SHARES.values()))
    if task == "chat":
        drawn = _chat(rng)
    else:
        while True:
            operands = _operands(task, rng)
            drawn = _phrase(task, operands, rng.random() < CHINESE_SHARE, rng)
            if drawn.key not in held_out_keys():
                break
    return _careless(drawn, rng)


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Draws one training chat: most have one turn, some a system prompt or up to three turns."""
    messages = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        question = sample(rng)
        messages.append({"role": "user", "content": question.question})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def vocabulary_texts() -> list[str]:
    """Every fixed text, in which the tokenizer finds its whole words."""
    texts = [CAPABILITIES, CAPABILITIES_CHINESE, *_SYSTEM_PROMPTS]
    texts += ["Sorry. I only add and subtract 0 to 99.", "抱歉。"]
    for questions, answer in GREETINGS:
        texts += [*questions, answer]
    for task in TASKS:
        for phrases in PHRASES[task]:
            texts += [*phrases.questions, phrases.answer]
    return texts


if __name__ == "__main__":
    for item in held_out():
        print(json.dumps(asdict(item), ensure_ascii=False))
