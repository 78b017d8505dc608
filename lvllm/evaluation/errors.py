"""Errors of an evaluation, and what an OpenAI-compatible server says turned into one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from lvllm.errors import LvllmError

__all__ = ["EvaluationError", "server_errors"]


class EvaluationError(LvllmError):
    """The model could not be measured; the message is one line for the user."""


@contextmanager
def server_errors(base_url: str, what: str) -> Iterator[None]:
    """Turn the OpenAI client's errors into an EvaluationError in one line.

    `what` says what the server did if it answered with an error: `refused a question`.
    """
    import openai

    try:
        yield
    except openai.APIConnectionError:
        raise EvaluationError(f"no server answers at {base_url}") from None
    except openai.APIError as error:
        raise EvaluationError(f"{base_url} {what}: {error.message}") from None
