"""The questions of an evaluation. A file of them has one JSON object in each line."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

TINY_MOE = Path(__file__).with_name("tiny_moe_questions.jsonl")


class Question(BaseModel):
    """A chat question and its only right answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    operands: tuple[int | str, ...]
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat that asks the question: one message of the user."""
        return [{"role": "user", "content": self.question}]

    def prompt(self, tokenizer: Any) -> list[int]:
        """The tokens that ask the question, by the chat template of a transformers tokenizer."""
        ids = tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True
        )
        return list(ids["input_ids"])


def load_questions(path: Path = TINY_MOE) -> list[Question]:
    """Read a file of questions, by default the 500 on which the demo model was not trained.

    Raises ValueError if a line is not a question, with file and line, or if there are none.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            questions.append(Question.model_validate_json(line))
        except ValidationError as error:
            reason = error.errors()[0]
            field = ".".join(map(str, reason["loc"]))
            raise ValueError(f"{path}, line {number}: {field} {reason['msg']}") from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions
