"""A GGUF file, as `lvllm plan` reads it."""

from lvllm.planning import gguf_shape
from tests.fuzz.planned import plan
from tests.fuzz.rules import ask
from tests.fuzz.scratch import scratch_folder


def one_input(data: bytes) -> None:
    with scratch_folder() as folder:
        path = folder / "model.gguf"
        path.write_bytes(data)
        if (model := ask(gguf_shape.of_file, path, "model")) is not None:
            ask(plan, model)
