"""Checkpoints that lack a tensor, and models whose weights are made up instead of loaded."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.e2e.generate import DEFAULTS, ONE_PROCESS, call
from tests.models.make import make
from tests.models.quantize import SCHEMES, quantize

# A scheme, and the end of the names of which one is taken away.
TAKEN = {
    "plain": (".weight",),
    "fp8_blocks": (".weight", ".weight_scale_inv"),
    "compressed_int4_zero_points": (".weight_packed", ".weight_zero_point"),
    "compressed_nvfp4": (".weight_global_scale",),
    "gptq_int4_act_order": (".scales", ".g_idx"),
}
# Beside the experts: what is taken away, and the line that says so.
OTHERS = {
    "model.embed_tokens.weight": "model.embed_tokens.weight is not in the checkpoint, or NaN:"
    " 384 of its 384 rows, the first is 0",
    "model.layers.1.self_attn.k_proj.weight": "model.layers.1.self_attn.qkv_proj.weight is not in"
    " the checkpoint, or NaN: 64 of its 256 rows, the first is 128",
    "model.layers.0.mlp.gate.weight": "model.layers.0.mlp.gate.weight is not in the checkpoint, or"
    " NaN: 4 of its 4 rows, the first is 0",
    "model.norm.weight": "model.norm.weight is not in the checkpoint",
}
MADE_UP = ("plain:INT4", "fp8_blocks", "compressed_mxfp4", "gptq_int8_groups")


def run(job: dict[str, Any], result: str) -> None:
    """In a forked process: load a model and generate; write how that ended to `result`."""
    from vllm import LLM, SamplingParams

    prompt: Any = {"prompt_token_ids": [5, 6, 7]}
    try:
        llm = LLM(**{**DEFAULTS, **job})
        llm.generate([prompt], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
        outcome = "generated"
    except ValueError as error:
        outcome = str(error)
    Path(result).write_text(outcome)


def checkpoint(plain: Path, scheme: str, out: Path) -> Path:
    return plain if scheme == "plain" else quantize(plain, SCHEMES[scheme], out)[0]


def without_one(folder: Path, suffix: str) -> str:
    """Takes a random expert's tensor of that name out of the checkpoint in `folder`."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    names = [name for name in names if ".experts." in name and name.endswith(suffix)]
    return without(folder, random.choice(names))


def without(folder: Path, name: str) -> str:
    """Takes this tensor out of the checkpoint in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name


def test_missing_and_made_up(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 128}
    plain = make("qwen3_moe", tmp_path / "plain", num_experts=4, mlp_only_layers=[], **sizes)
    jobs: list[dict[str, Any]] = []
    wanted = []
    for scheme, suffixes in TAKEN.items():
        for suffix in suffixes:
            out = tmp_path / f"{scheme}{suffix}"
            folder = out / "quantized"
            if scheme == "plain":
                make("qwen3_moe", folder, num_experts=4, mlp_only_layers=[], **sizes)
            else:
                checkpoint(plain, scheme, out)
            name = without_one(folder, suffix)
            jobs.append({"model": str(folder)})
            wanted.append(f"{name} is not in the checkpoint")
    for name, line in OTHERS.items():
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        jobs.append({"model": str(folder)})
        without(folder, name)
        wanted.append(f"{line}")
    greedy = tmp_path / "greedy"
    shutil.copytree(plain, greedy)
    config = json.loads((greedy / "config.json").read_text())
    (greedy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
    jobs.append({"model": str(greedy)})
    said = "a whole number from 1 to 4 is wanted, as the model has 4 experts"
    wanted.append(f"{greedy / 'config.json'}: num_experts_per_tok=5 is not allowed: {said}")
    for case in MADE_UP:
        scheme, _, use_weight = case.partition(":")
        folder = checkpoint(plain, scheme, tmp_path / case)
        section = {"lvllm": {"moe_use_weight": use_weight}} if use_weight else {}
        jobs.append({"model": str(folder), "load_format": "dummy", "additional_config": section})
        wanted.append("generated")
    outcomes = []
    for job in jobs:
        with (tmp_path / "log").open("w") as log:
            call(run, job, str(tmp_path / "outcome"), log=log, environment=ONE_PROCESS)
        outcomes.append((tmp_path / "outcome").read_text())
    assert outcomes == wanted
