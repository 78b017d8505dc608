"""What was said in a chat."""

import json
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Conversation"]


@dataclass
class Conversation:
    """The exchanges of a chat, each a question and its answer, below a system message.

    A question enters with its answer, so that a failed one can be asked again.
    """

    system: str = ""
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    unanswered: str | None = None
    """The last question, if it was not answered."""

    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI's messages, with the unanswered question at the end."""
        said = [("system", self.system)] if self.system else []
        for question, answer in self.exchanges:
            said += [("user", question), ("assistant", answer)]
        if self.unanswered is not None:
            said.append(("user", self.unanswered))
        return [{"role": role, "content": content} for role, content in said]

    def ask(self, question: str) -> None:
        """Put `question` in the place of an unanswered one."""
        self.unanswered = question

    def answer(self, text: str) -> None:
        """Answer the unanswered question. Raises ValueError if there is none."""
        if self.unanswered is None:
            raise ValueError("no question waits for an answer")
        self.exchanges.append((self.unanswered, text))
        self.unanswered = None

    def retry(self) -> bool:
        """Make the last question unanswered, and forget its answer. False if there is none."""
        if self.unanswered is None and self.exchanges:
            self.unanswered, _ = self.exchanges.pop()
        return self.unanswered is not None

    def clear(self) -> None:
        """Forget all but the system message."""
        self.exchanges.clear()
        self.unanswered = None

    def save(self, file: Path) -> None:
        """Write the answered messages as JSON. Raises OSError, also if `file` exists."""
        messages = Conversation(self.system, self.exchanges).messages()
        with file.open("x", encoding="utf-8") as out:
            out.write(json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
