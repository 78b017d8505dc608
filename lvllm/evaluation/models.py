"""The models that can be measured: a checkpoint, one that is exported first, or a served model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from lvllm.checkpoint.gguf.folder import folder_of, is_presented
from lvllm.checkpoint.headers import TensorInfo, read_header
from lvllm.checkpoint.opening import open_checkpoint
from lvllm.evaluation.answers import ask_server
from lvllm.evaluation.connection import http_client, openai_client
from lvllm.evaluation.errors import EvaluationError, server_errors
from lvllm.evaluation.logprobs import LOGPROBS_OF_A_PASSAGE, logprobs_from_server
from lvllm.evaluation.passages import LocalTokenizer, Tokenizer
from lvllm.evaluation.processes import Outcome, Work, run_in_new_process, run_vllm

EXPORTED = ("fp8", "int8", "int4", "mxfp4", "nvfp4")
DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
FORMATS = (*DTYPES, *EXPORTED)
"""The formats of the engine: dtypes in which a checkpoint can run, and formats to export it to."""


@dataclass(frozen=True)
class Measured:
    """An outcome, and the bytes of the routed experts, which are None if they are not known."""

    outcome: Outcome
    expert_bytes: int | None


class Model(Protocol):
    """A model that can be measured."""

    @property
    def name(self) -> str: ...

    @property
    def on_lvllm(self) -> bool: ...

    def tokenizer(self) -> Tokenizer: ...

    def check(self, work: Work) -> None:
        """Raises ValueError if the model cannot do `work`. Nothing is loaded for that."""

    def vocabulary(self) -> int | None:
        """How many tokens the vocabulary has, None if that is not known."""

    def measure(self, work: Work) -> Measured: ...


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint folder or a GGUF file that runs in vLLM.

    With `lvllm` it runs with LvLLM, and a GGUF file always does; otherwise the environment decides.
    `dtype` is the name of a torch dtype. Raises ValueError if the folder is no checkpoint.
    """

    folder: str
    dtype: str
    name: str
    lvllm: bool = False
    own_tokenizer: str | None = None
    """A folder or an id on the hub whose tokenizer is taken in the place of the model's."""

    def __post_init__(self) -> None:
        if not (self.described / "config.json").exists():
            raise ValueError(f"{self.folder!r} is no checkpoint folder: it has no config.json")

    @cached_property
    def described(self) -> Path:
        """The folder with config.json and the tokenizer."""
        return folder_of(self.folder, tokenizer=not self.own_tokenizer) or Path(self.folder)

    @property
    def on_lvllm(self) -> bool:
        """Whether LvLLM runs it, whatever the environment says."""
        return self.lvllm or is_presented(self.described)

    def tokenizer(self) -> Tokenizer:
        return LocalTokenizer(self.own_tokenizer or str(self.described), self.folder)

    def config(self) -> dict[str, Any]:
        """config.json, with the values of its `text_config`, if there is one, in front."""
        try:
            config: Any = json.loads((self.described / "config.json").read_text())
            return {**config, **config.get("text_config", {})}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.folder}/config.json: {error}") from None

    def vocabulary(self) -> int | None:
        return self.config().get("vocab_size")

    def quantization(self) -> str | None:
        """The name of the quantisation method, None if the checkpoint is not quantised."""
        method = self.config().get("quantization_config", {}).get("quant_method")
        return None if method is None else str(method)

    def check(self, work: Work) -> None:
        longest = work.passages.longest if work.passages else 0
        most = self.config().get("max_position_embeddings")
        if most and longest >= most:
            raise ValueError(
                f"{self.folder} takes {most} tokens, and a passage has {longest}, after which one"
                f" more is generated: allowed are {most - 1}"
            )
        top = min(work.top, self.vocabulary() or work.top)
        if longest * top > LOGPROBS_OF_A_PASSAGE:
            raise ValueError(
                f"--top {work.top}: of passages of {longest} tokens vLLM can list the"
                f" {LOGPROBS_OF_A_PASSAGE // longest} most probable in each place"
            )

    def measure(self, work: Work) -> Measured:
        outcome = run_in_new_process(
            self.name,
            run_vllm,
            self.folder,
            self.dtype,
            work,
            self.name,
            self.on_lvllm,
            self.own_tokenizer,
        )
        return Measured(outcome, expert_bytes(self.described))


@dataclass(frozen=True)
class ExportedModel:
    """`source` with its experts exported to `format`.

    The export lasts for one measurement. It is in a temporary folder, below TMPDIR.
    """

    source: LocalModel
    format: str

    @property
    def name(self) -> str:
        return self.format

    @property
    def on_lvllm(self) -> bool:
        return True

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def check(self, work: Work) -> None:
        self.source.check(work)

    def vocabulary(self) -> int | None:
        return self.source.vocabulary()

    def measure(self, work: Work) -> Measured:
        from lvllm.export import export

        with TemporaryDirectory(prefix="lvllm-eval-") as scratch:
            out = Path(scratch) / self.format
            run_in_new_process(self.name, export, Path(self.source.folder), out, format=self.format)
            exported = replace(self.source, folder=str(out), name=self.name)
            return exported.measure(work)


class ServedModel:
    """A model of an OpenAI-compatible server, by default the server's first.

    Raises EvaluationError if no server answers.
    """

    def __init__(self, base_url: str, model: str = "", api_key: str = "") -> None:
        self.base_url = base_url
        self._api_key = api_key
        client = openai_client(base_url, api_key)
        with server_errors(base_url, "names no model"):
            self.name = model or client.models.list().data[0].id

    @property
    def on_lvllm(self) -> bool:
        """False: nobody here knows."""
        return False

    def tokenizer(self) -> Tokenizer:
        return ServerTokenizer(self.base_url, self.name, self._api_key)

    def check(self, work: Work) -> None:
        """Nothing to check here: the server refuses what is too much for it."""

    def vocabulary(self) -> None:
        """None: the server does not say."""

    def measure(self, work: Work) -> Measured:
        answers, likelihoods = [], None
        if work.questions:
            answers = ask_server(
                work.questions, self.base_url, model=self.name, api_key=self._api_key
            )
        if work.passages:
            likelihoods = logprobs_from_server(
                work.passages, self.base_url, work.top, model=self.name, api_key=self._api_key
            )
        return Measured(Outcome(answers, likelihoods), None)


@dataclass(frozen=True)
class ServerTokenizer:
    """The tokenizer behind a vLLM server's `/tokenize`, which is beside `/v1`, not below it."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._ask({"prompt": text, "add_special_tokens": special})

    def chat(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
        return self._ask({"messages": messages, "add_generation_prompt": generation_prompt})

    def _ask(self, body: dict[str, Any]) -> list[int]:
        import httpx

        url = self.base_url.rstrip("/").removesuffix("/v1") + "/tokenize"
        try:
            with http_client(self.base_url, self.api_key) as client:
                answer = client.post(url, json={"model": self.model, **body})
            answer.raise_for_status()
            return list(answer.json()["tokens"])
        except httpx.TransportError:
            raise EvaluationError(f"no server answers at {url}") from None
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise EvaluationError(f"{url} makes no tokens: {reason}") from None


def expert_bytes(folder: Path) -> int:
    """Bytes of the routed experts' tensors, scales included, from the headers of the files."""
    if is_presented(folder):
        tensors: Iterable[TensorInfo] = open_checkpoint(folder).tensors.values()
    else:
        tensors = (one for file in folder.glob("*.safetensors") for one in read_header(file))
    return sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
