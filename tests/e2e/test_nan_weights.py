"""NaN weights in two experts, served by two ranks: who meets them gets an error, all others an
answer."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import safetensors.torch
import torch
import transformers

from tests.e2e.server import Server
from tests.models.make import VOCABULARY, make

# (layer, expert, projection, row, column): the first rank holds the first half of the columns of
# down_proj, the second rank the others. Of the last layer no later one sees the NaN come in.
NANS = ((1, 5, "down_proj", 7, 3), (3, 2, "down_proj", 100, 70))
TOPK = 3
# Router logits are some 1 apart; in bfloat16 those of a layer are off by some 0.01.
NEAR = 0.05


def expected(plain: Path, prompts: list[list[int]]) -> list[str | None]:
    """Of each prompt what transformers says about its last fault-free layer: the layer and expert
    that its tokens meet first, "" if none, None where the choice of a router before is a near tie.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    found: list[str | None] = []
    for prompt in prompts:
        with torch.no_grad():
            out = model(torch.tensor([prompt]), output_router_logits=True)
        answer: str | None = ""
        broken = {layer: expert for layer, expert, *_ in NANS}
        for layer, router_logits in enumerate(out.router_logits):
            logits = router_logits.sort(dim=-1, descending=True)
            last, next_best = logits.values[:, TOPK - 1], logits.values[:, TOPK]
            if (expert := broken.get(layer)) is not None:
                # How far the expert is from the border between the chosen and the others.
                gap = (router_logits[:, expert] - (last + next_best) / 2).abs().min()
                if gap < NEAR:
                    answer = None
                elif (logits.indices[:, :TOPK] == expert).any():
                    answer = f"model.layers.{layer}.mlp.experts: expert {expert} makes NaN"
            # With another expert in one layer, the router of each later layer sees other tokens.
            if answer == "" and (last - next_best).min() < NEAR and layer < max(broken):
                answer = None
            if answer != "":
                break
        found.append(answer)
    return found


def poisoned(tmp: Path, seed: int) -> tuple[Path, Path]:
    """A checkpoint, and the same with its NaNs."""
    sizes = {"num_hidden_layers": 4, "mlp_only_layers": [], "moe_intermediate_size": 80}
    plain = make("qwen3_moe", tmp / "plain", seed, **sizes)
    broken = make("qwen3_moe", tmp / "broken", seed, **sizes)
    file = broken / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for layer, expert, projection, row, column in NANS:
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        tensors[name][row, column] = float("nan")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return plain, broken


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Path, Path]]:
    """(plain checkpoint, base URL, model name, log)"""
    tmp = tmp_path_factory.mktemp("watch")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    plain, broken = poisoned(tmp, seed)
    # Few blocks of keys and values: those of requests that failed are used again at once.
    arguments = (
        *("--tensor-parallel-size", "2", "--enforce-eager", "--dtype", "bfloat16"),
        *("--skip-tokenizer-init", "--max-model-len", "64", "--max-num-seqs", "4"),
        *("--block-size", "32", "--num-gpu-blocks-override", "9"),
        *("--kv-cache-memory-bytes", str(16 << 20)),
    )
    log = tmp / "log"
    with Server(log, str(broken), *arguments, TORCHDYNAMO_DISABLE="1").ready() as server:
        yield plain, f"{server.url}/v1", broken, log


def test_only_requests_that_meet_a_nan_fail(served: tuple[Path, str, Path, Path]) -> None:
    plain, url, model, log = served
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    prompts = [[random.randrange(3, VOCABULARY)] for _ in range(100)]
    prompts += [[random.randrange(3, VOCABULARY) for _ in range(2)] for _ in range(40)]
    wanted = expected(plain, prompts)
    assert wanted.count("") > 3
    assert len({want for want in wanted if want}) == 2, "each of the two is met by someone"

    def ask(prompt: list[int], stream: bool = False) -> str:
        """What the server says: nothing, or an error."""
        asked: Any = {"model": str(model), "prompt": prompt, "max_tokens": 1, "temperature": 0}
        asked["extra_body"] = {"ignore_eos": True}
        try:
            answer: Any = client.completions.create(**asked, stream=stream)
            choices = [c for part in answer for c in part.choices] if stream else answer.choices
        except openai.APIError as error:
            return error.message
        assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
        return ""

    with ThreadPoolExecutor(4) as pool:
        for stream in (False, True):
            said = list(pool.map(lambda prompt: ask(prompt, stream), prompts))  # noqa: B023
            for prompt, want, got in zip(prompts, wanted, said, strict=True):
                if want is not None:
                    status = "Error code: 500 - " if want and not stream else ""
                    assert got.startswith(status + want), (prompt, stream, got)
                    assert bool(want) == bool(got), (prompt, stream, got)
    text = log.read_text()
    assert "EngineDeadError" not in text
    assert "ends with an error: model.layers.1.mlp.experts: expert 5 makes NaN" in text
