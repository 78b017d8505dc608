"""Single values among the fields of a GGUF header, with the bounds that they must keep."""

import math

from lvllm.checkpoint.gguf_headers import Field, GgufHeader
from lvllm.checkpoint.headers import CheckpointError
from lvllm.checkpoint.moe_layers import MOST_LAYERS
from lvllm.errors import quoted

__all__ = ["Fields"]


class Fields:
    """The fields that describe a model; their names begin with its architecture.

    Every function raises CheckpointError, in one line with the file and the field, for a value that
    is not allowed, and for one that is missing and has no default.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        architecture = header.fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{header.file}: has no field 'general.architecture'")
        self.architecture = architecture

    @property
    def layers(self) -> int:
        """The decoder layers of the model, without those that only draft tokens."""
        layers = self.whole("block_count", 1, MOST_LAYERS)
        return layers - self.whole("nextn_predict_layers", 0, layers - 1, 0)

    @property
    def dense_layers(self) -> int:
        """How many layers, the first ones, have no experts."""
        return self.whole("leading_dense_block_count", 0, self.layers, 0)

    def rotary(self, head: int) -> float:
        """The part of a head's values that RoPE rotates."""
        return self.whole("rope.dimension_count", 1, head, head) / head

    def whole(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number from `least` to `most`."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            wanted = f"a whole number from {least} to {most}" if most > least else str(most)
            raise self.refuse(key, value, f"{wanted} is wanted")
        return value

    def for_layers(self, key: str) -> list[int]:
        """A whole number, or a truth value, for each layer; the file may have one for all."""
        value, layers = self._value(key, None), self.layers
        values = value if isinstance(value, list) else [value] * layers
        found = [int(one) for one in values[:layers] if isinstance(one, int) and one >= 0]
        if len(found) < layers:
            raise self.refuse(key, value, f"{layers} whole numbers are wanted")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A number greater than 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, value, "a number is wanted")
        if not (math.isfinite(value) and value > 0):
            raise self.refuse(key, value, "a number greater than 0 is wanted")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false is wanted")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, value, "a text is wanted")
        return value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Field | None:
        """A value as it is."""
        return self.header.fields.get(f"{self.architecture}.{key}")

    def refuse(self, key: str, value: object, wanted: str) -> CheckpointError:
        """An error about a field."""
        name = f"{self.architecture}.{key}"
        return CheckpointError(
            f"{self.header.file}: field {quoted(name)} is {quoted(value)}: {wanted}"
        )

    def _value(self, key: str, default: Field | None) -> Field:
        name = f"{self.architecture}.{key}"
        value = self.header.fields.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.header.file}: has no field {quoted(name)}")
        return value
