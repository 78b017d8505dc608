"""vLLM's features with experts on the engine: none may change a token."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.lora import model_manager
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase

from lvllm.patches import lora
from lvllm.settings.model_checks import check_features
from lvllm.settings.variables import SettingError
from tests.e2e import reference
from tests.e2e.generate import ONE_PROCESS, TINY, Answers, Job, generate
from tests.e2e.test_exactness import BOUND, check_against_reference, prompts, share
from tests.models import drafts_and_adapters

TOKENS = 12
SUPPORTED = "get_supported_lora_modules"
# What makes of the demo model's answers must be the same: its probabilities are far from ties.
FEATURES: dict[str, Job] = {
    "plain": {},
    # Less than the longest prompt: it takes several steps, beside the others' decoding.
    "chunked_prefill": {"max_num_batched_tokens": 8, "max_num_seqs": 4},
    # As many at a time as are asked first; the second round finds their blocks.
    "prefix_caching": {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 3},
    "draft_model": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    "eagle": {"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}},
    "eagle3": {"speculative_config": {"method": "eagle3", "num_speculative_tokens": 2}},
    # Last: it loads modules that vLLM, starting again in one process, stumbles over.
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    },
}
DRAFTS = ("draft_model", "eagle", "eagle3")
# Once more beside an accelerator, by its stand-in on the host: chunks of prompts and drafts make
# batches on both sides of the threshold. n-grams are in tests/e2e/test_served_offload.py.
TWICE = ("lora", "mtp", "chunked_prefill", "prefix_caching", "draft_model", "eagle")
OFFLOADED: Job = {
    "additional_config": {
        "lvllm": {
            "accelerator": "host",
            "gpu_prefill_min_batch_size": 6,
            "gpu_prefetch_window": 1,
        }
    }
}


def offloaded(name: str) -> str:
    return f"{name} offloaded"


Run = tuple[dict[str, Answers], dict[str, Path], list[Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every job's answers, the folders of models, and what the random model was asked."""
    tmp = tmp_path_factory.mktemp("features")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    adapter = drafts_and_adapters.adapter(TINY, tmp / "adapter")
    mtp, mtp_values = drafts_and_adapters.with_mtp("glm4_moe", tmp, seed)
    folders = {
        "draft_model": drafts_and_adapters.noisy(TINY, tmp / "draft_model", 0.1),
        "eagle": drafts_and_adapters.eagle(TINY, tmp / "eagle", 1),
        "eagle3": drafts_and_adapters.eagle(TINY, tmp / "eagle3", 3),
        "lora": drafts_and_adapters.merged(TINY, adapter, tmp / "merged"),
        "mtp": mtp_values,
    }
    draw = random.Random(3)
    known = [[draw.randrange(3, 40) for _ in range(n)] for n in (3, 18, 41)]
    asked = prompts(seed)
    drafting = {"method": "mtp", "num_speculative_tokens": 2}
    jobs: dict[str, Job] = {
        "lora": {"model": str(TINY), "prompts": known, "enable_lora": True}
        | {"max_lora_rank": 8, "adapter": str(adapter)},
        "mtp_off": {"model": str(mtp), "prompts": asked},
        "mtp": {"model": str(mtp), "prompts": asked, "speculative_config": drafting},
    }
    for name, feature in FEATURES.items():
        jobs[name] = {"model": str(TINY), "prompts": known} | feature
    jobs["prefix_caching"]["prompts"] = known * 2
    for name in DRAFTS:
        with_model = jobs[name]["speculative_config"] | {"model": str(folders[name])}
        jobs[name]["speculative_config"] = with_model
    last = jobs.pop("ngram")
    jobs |= {offloaded(name): jobs[name] | OFFLOADED for name in TWICE}
    jobs["ngram"] = last
    answered = generate(
        [job | {"max_tokens": TOKENS} for job in jobs.values()], environment=ONE_PROCESS
    )
    return dict(zip(jobs, answered, strict=True)), folders, asked


@pytest.mark.parametrize(
    "name",
    [name for name in FEATURES if name != "plain"]
    + [offloaded(name) for name in TWICE if name in FEATURES],
)
def test_tokens_are_the_same(name: str, run: Run) -> None:
    plain = run[0]["plain"]
    for i, answer in enumerate(run[0][name]):
        expected = plain[i % len(plain)]
        assert answer["tokens"] == expected["tokens"]
        # Each of them may err by BOUND. On a CPU with AMX, they differed by 0.106.
        for a, b in zip(answer["logprobs"], expected["logprobs"], strict=True):
            assert abs(a - b) <= 2 * BOUND


def test_without_a_compiler(run: Run) -> None:
    plain = run[0]["plain"]
    asked = [answer["prompt"] for answer in plain]
    job = {"model": str(TINY), "prompts": asked, "max_tokens": TOKENS, "enforce_eager": False}
    (answers,) = generate(
        [job],
        environment=ONE_PROCESS | {"CXX": "no-such-g++"},
        logged=r"torch\.compile is off, because there is no C\+\+ compiler \(no-such-g\+\+;",
    )
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in plain]


def test_features_were_in_use(run: Run) -> None:
    answers = run[0]
    # Of the 41 tokens of the longest prompt one whole block.
    for name in ("prefix_caching", offloaded("prefix_caching")):
        assert [answer["cached"] for answer in answers[name]] == [0, 0, 0, 0, 0, 32]
    known = ("ngram", "draft_model", offloaded("draft_model"))
    for name in (*known, "eagle", offloaded("eagle"), "eagle3", "mtp", offloaded("mtp")):
        proposed, accepted = answers[name][0]["drafted"]
        assert proposed > 0, name
        if name in known:
            assert accepted > 0, name


@pytest.mark.parametrize("name", ["mtp", offloaded("mtp")])
def test_multi_token_prediction(name: str, run: Run) -> None:
    """A random model has near-ties of tokens, which may differ from there on.

    It has near-ties of experts as well. Where a score is rounded to the other side, a token that
    was not close wins: this is allowed for one prompt of the four.
    """
    answers, folders, asked = run
    check_against_reference(folders["mtp"], asked, answers[name])
    model = reference.load(folders["mtp"])
    gaps = []
    for prompt, plain, drafted in zip(asked, answers["mtp_off"], answers[name], strict=True):
        ours, other = drafted["tokens"], plain["tokens"]
        if ours == other:
            gaps.append(0.0)
            continue
        step = next(i for i in range(TOKENS) if ours[i] != other[i])
        row = reference.logprobs(model, prompt, ours)[step]
        gaps.append(abs(row[ours[step]] - row[other[step]]).item())
    assert share(gaps, 2 * BOUND) >= 0.75


@pytest.mark.parametrize("name", ["lora", offloaded("lora")])
def test_lora_on_attention(name: str, run: Run) -> None:
    answers, folders, _ = run
    lora, plain = answers[name], answers["plain"]
    check_against_reference(folders["lora"], [answer["prompt"] for answer in lora], lora)
    assert [answer["tokens"] for answer in lora] != [answer["tokens"] for answer in plain]


def test_an_adapter_with_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses what has other modules than it supports, when it loads it."""

    def bare(kind: type[torch.nn.Module]) -> torch.nn.Module:
        module = kind.__new__(kind)
        torch.nn.Module.__init__(module)
        return module

    # Restored afterwards.
    monkeypatch.setattr(model_manager, SUPPORTED, getattr(model_manager, SUPPORTED))
    model = torch.nn.ModuleDict({"o_proj": bare(LinearBase), "experts": bare(MoERunner)})
    assert sorted(getattr(model_manager, SUPPORTED)(model)) == ["experts", "o_proj"]
    for _ in range(2):
        lora.leave_out_experts.install()
        assert getattr(model_manager, SUPPORTED)(model) == ["o_proj"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"targets": ["q_proj", "experts"]}, "lora-target-modules='experts' is not allowed"),
        ({"method": "ngram_gpu"}, "speculative-config method='ngram_gpu' is not allowed"),
    ],
)
def test_refused_by_lvllm(setting: dict[str, Any], says: str) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_num_experts=lambda: 8),
        lora_config=SimpleNamespace(target_modules=setting.get("targets")),
        speculative_config=SimpleNamespace(method=setting.get("method")),
    )
    with pytest.raises(SettingError, match=says) as error:
        check_features(config, "none")
    assert "\n" not in str(error.value)


def test_sleep_mode_is_refused_by_vllm() -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(model=str(TINY), enable_sleep_mode=True).create_model_config()
