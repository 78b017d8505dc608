"""Exact match: an answer is right if it is the expected text, character for character.

Only white space may differ: several spaces count as one, and spaces at either end do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lvllm.evaluation.questions import Question


@dataclass(frozen=True)
class Tally:
    """How many of the answers were right."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.asked


@dataclass(frozen=True)
class Result:
    """The tally of each task, in the order of the questions, and every wrong answer."""

    by_task: dict[str, Tally]
    wrong: tuple[tuple[Question, str], ...]

    @property
    def total(self) -> Tally:
        tallies = self.by_task.values()
        return Tally(sum(t.right for t in tallies), sum(t.asked for t in tallies))

    @property
    def accuracy(self) -> float:
        """Share of right answers over all tasks, 0 to 1."""
        return self.total.accuracy


def is_right(answer: str, expected: str) -> bool:
    return answer.split() == expected.split()


def score(questions: Sequence[Question], answers: Sequence[str]) -> Result:
    """Compare `answers[i]` with `questions[i].answer`.

    Raises ValueError if there are no questions, or not as many answers as questions.
    """
    if not questions:
        raise ValueError("no questions to score")
    if len(questions) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions")
    marks: dict[str, list[bool]] = {}
    wrong = []
    for question, answer in zip(questions, answers, strict=True):
        right = is_right(answer, question.answer)
        marks.setdefault(question.task, []).append(right)
        if not right:
            wrong.append((question, answer))
    tallies = {task: Tally(sum(rights), len(rights)) for task, rights in marks.items()}
    return Result(tallies, tuple(wrong))
