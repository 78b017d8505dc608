"""The family of errors that LvLLM raises about what a user gave it: settings, files, models.

The text of each is one line for the user: what is wrong, its name and value, and what is allowed.
A command prints that line and exits with code 1; only other errors show a traceback. A program that
uses vLLM as a library may catch the error (`lvllm.faults.process.refusal`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

__all__ = [
    "LayerError",
    "LvllmError",
    "TensorError",
    "layer_errors",
    "naming_layer",
    "quoted",
    "readable",
]

Method = TypeVar("Method", bound=Callable[..., Any])


class LvllmError(ValueError):
    """An error whose text is one line that a user can act upon."""


class LayerError(LvllmError):
    """A model's layer that cannot be built, loaded or computed. The text begins with its name."""


class TensorError(LvllmError):
    """A tensor of the checkpoint that a layer cannot take.

    The code that raises this has the values and not the name in the checkpoint, so that the text
    does not name the tensor. The loader knows it and puts its file, name, dtype and shape in front.
    """


def quoted(value: object) -> str:
    """What a user wrote, for an error's line: a text in quotes, anything else as JSON.

    It is escaped, and cut after 200 characters.
    """
    text = repr(value[:201]) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 202 else f"{text[:200]}..."


def readable(name: str) -> str:
    """A name or path that a user wrote, as it is, or `quoted` if a line would not show it well."""
    return (
        name if name.isprintable() and name == name.strip() and len(name) <= 200 else quoted(name)
    )


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Turn a ValueError or MemoryError of the block into a LayerError that begins with `name`.

    The engine and the formats raise these two about what they are given, and know no layer.
    An LvllmError says all that a user needs, and stays as it is.
    """
    try:
        yield
    except LvllmError:
        raise
    except (ValueError, MemoryError) as error:
        said = str(error)
        raise LayerError(said if said.startswith(name) else f"{name}: {said}") from error


def layer_errors(method: Method) -> Method:
    """Decorate a method (self, layer, ...) so that it runs under the name of that layer."""

    @wraps(method)
    def named(self: Any, layer: Any, *args: Any, **options: Any) -> Any:
        with naming_layer(layer.layer_name):
            return method(self, layer, *args, **options)

    return named  # type: ignore[return-value]
