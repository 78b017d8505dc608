"""A GGUF file, as `lvllm plan` reads it, and as it becomes a folder for vLLM."""

from lvllm.checkpoint.gguf.folder import configuration
from lvllm.checkpoint.gguf.tokenizer import write_tokenizer
from lvllm.checkpoint.gguf_headers import open_gguf
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
        if (header := ask(open_gguf, path, vocabulary=True)) is not None:
            ask(configuration, header)
            ask(write_tokenizer, header, folder, 4096)
