"""How long a model takes to load, compared with `cat FILES > /dev/null`.

    python -m benchmarks.loading [--gib 8] [--shard-gib 4] [--experts fp8] [--folder DIR] [--stock]

This makes a Qwen3-MoE checkpoint of the given size with meaningless weights, and reads it once, so
that the files are in the page cache. Then it times three things: cat (the median of three runs),
writing once to as much new memory, and vLLM's loading phase, which builds the model, reads the
weights and orders them for the kernels. The phase is timed twice: in a fresh process, and right
after as much memory was written to and given back, so that a virtual machine has it in hand.
The benchmark needs the size on disk, and twice the size plus 3 GiB of memory. In the end it deletes
the checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from lvllm.checkpoint.headers import INDEX, Checkpoint
from lvllm.units import GIB, ceil_div

ROOT = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, EXPERTS = 2048, 768, 64
LAYER_WEIGHTS = EXPERTS * 3 * HIDDEN * INTERMEDIATE
ONE = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
DTYPES = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}

# This program loads the model without worker processes, generates two tokens, and prints what was
# measured.
CHILD = """
import json, re, resource, sys, time
from pathlib import Path
import torch
from lvllm.engine import bank
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
load_model = BaseModelLoader.load_model
found = {}
def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
def io(key):
    return int(re.search(key + r": (\\d+)", Path("/proc/self/io").read_text())[1])
def timed(*args, **options):
    if size := int(sys.argv[2]):
        memory = bank.allocate((1, size), torch.uint8)
        memory.fill_(1)
        del memory
    start, used = time.perf_counter(), cpu()
    keys = ("rchar", "read_bytes", "write_bytes")
    before = {key: io(key) for key in keys}
    model = load_model(*args, **options)
    found["seconds"], found["cpu"] = time.perf_counter() - start, cpu() - used
    for key in keys:
        found[key] = io(key) - before[key]
    return model
BaseModelLoader.load_model = timed
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=64 << 20,
          disable_log_stats=True, skip_tokenizer_init=True)
llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
status = Path("/proc/self/status").read_text()
found["peak"] = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
print("found", json.dumps(found))
"""

TOUCH = """
import sys, time
import torch
from lvllm.engine import bank
memory = bank.allocate((1, int(sys.argv[1])), torch.uint8)
start = time.perf_counter()
memory.fill_(1)
print(time.perf_counter() - start)
"""


def make(folder: Path, size: int, shard: int, experts: str = "bf16") -> None:
    """Write a checkpoint of about `size` bytes, in files of about `shard` bytes.

    The experts are in "bf16", or in "fp8" with float32 scales of 128 x 128 blocks.
    """
    bits = {"bf16": 16, "fp8": 8}[experts]
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=max(1, round(size / (LAYER_WEIGHTS * bits / 8))),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    tensors = list(_tensors(config, experts))
    if experts == "fp8":
        plain = [name.removesuffix(".weight") for name, dtype, _ in tensors if dtype == "BF16"]
        config.quantization_config = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "ignored_layers": plain,
        }
    config.save_pretrained(folder)
    files: list[tuple[dict[str, Any], int]] = [({}, 0)]
    placed = {}
    for name, dtype, shape in tensors:
        if files[-1][1] >= shard:
            files.append(({}, 0))
        header, begin = files[-1]
        end = begin + DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        files[-1] = (header, end)
        placed[name] = f"model-{len(files):05}.safetensors"
    values = {dtype: _values(dtype) for dtype in DTYPES}
    for number, (header, _) in enumerate(files, 1):
        text = json.dumps(header).encode()
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for field in header.values():
                begin, end = field["data_offsets"]
                # Norms are ones: with others, the experts' part of the result would be tiny.
                block = ONE if len(field["shape"]) == 1 else values[field["dtype"]]
                file.write((block * ceil_div(end - begin, len(block)))[: end - begin])
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def _values(dtype: str) -> bytes:
    """Bytes of values that the model can compute with. They are repeated to fill a tensor."""
    if dtype == "F32":  # a scale
        return torch.tensor(HIDDEN**-0.5).view(1).view(torch.uint8).numpy().tobytes()
    values = torch.randn(1 << 20) * (1 if dtype == "F8_E4M3" else HIDDEN**-0.5)
    return values.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()


def _tensors(config: Any, experts: str) -> Iterator[tuple[str, str, list[int]]]:
    """The name, dtype and shape of each of the model's tensors."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads
    yield "model.embed_tokens.weight", "BF16", [512, HIDDEN]
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "input_layernorm": [HIDDEN],
            "self_attn.q_proj": [heads, HIDDEN],
            "self_attn.k_proj": [kv * config.head_dim, HIDDEN],
            "self_attn.v_proj": [kv * config.head_dim, HIDDEN],
            "self_attn.o_proj": [HIDDEN, heads],
            "self_attn.q_norm": [config.head_dim],
            "self_attn.k_norm": [config.head_dim],
            "post_attention_layernorm": [HIDDEN],
            "mlp.gate": [EXPERTS, HIDDEN],
        }.items():
            yield f"model.layers.{layer}.{name}.weight", "BF16", shape
        for expert in range(EXPERTS):
            for name, shape in {
                "gate_proj": [INTERMEDIATE, HIDDEN],
                "up_proj": [INTERMEDIATE, HIDDEN],
                "down_proj": [HIDDEN, INTERMEDIATE],
            }.items():
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                yield f"{stem}.weight", "F8_E4M3" if experts == "fp8" else "BF16", shape
                if experts == "fp8":
                    yield f"{stem}.weight_scale_inv", "F32", [ceil_div(size, 128) for size in shape]
    yield "model.norm.weight", "BF16", [HIDDEN]
    yield "lm_head.weight", "BF16", [512, HIDDEN]


def cat(files: tuple[Path, ...]) -> float:
    """Seconds that cat takes for the files, once."""
    start = time.perf_counter()
    with open(os.devnull, "w") as null:
        subprocess.run(["cat", *map(str, files)], stdout=null, check=True)
    return time.perf_counter() - start


def touch(size: int) -> float:
    """Seconds that a new process takes to write once to `size` bytes of memory."""
    done = subprocess.run(
        [sys.executable, "-c", TOUCH, str(size)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return float(done.stdout)


def load(folder: Path, enabled: bool, in_hand: int = 0) -> dict[str, float]:
    """What a process that loads the model measures of the loading phase.

    That is `seconds`, `cpu` (seconds of all CPUs), `rchar` (bytes read by system calls),
    `read_bytes` and `write_bytes` (bytes from and to disks), and `peak` (the most resident bytes of
    the process). Just before the phase, the process writes to `in_hand` bytes of memory and gives
    them back. Without `enabled`, stock vLLM loads the model.
    """
    environment = {
        "LVLLM_MOE_NUMA_ENABLED": str(int(enabled)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(in_hand)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout[-6000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    found: dict[str, float] = json.loads(line.removeprefix("found "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--shard-gib", type=float, default=4)
    parser.add_argument("--experts", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--folder", type=Path, help="where to make it; default the system's")
    parser.add_argument("--stock", action="store_true", help="time stock vLLM too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sizes = int(arguments.gib * GIB), int(arguments.shard_gib * GIB)
        make(folder, *sizes, arguments.experts)
        checkpoint = Checkpoint.open(folder)
        gib = checkpoint.nbytes / GIB
        cat(checkpoint.files)
        seconds = statistics.median(cat(checkpoint.files) for _ in range(3))
        largest = max(file.stat().st_size for file in checkpoint.files) / GIB
        print(f"{gib:.2f} GiB, largest file {largest:.2f} GiB")
        print(f"cat        {seconds:6.2f} s  {gib / seconds:5.2f} GiB/s")
        once = touch(checkpoint.nbytes)
        print(f"touch      {once:6.2f} s  {gib / once:5.2f} GiB/s: new memory, written once")
        bound = 1.3 * seconds + 10
        ways = [("LvLLM", True, 0), ("in hand", True, checkpoint.nbytes)]
        if arguments.stock:
            ways.append(("stock", False, 0))
        for label, enabled, in_hand in ways:
            found = load(folder, enabled, in_hand)
            print(
                f"{label:10} {found['seconds']:6.2f} s  {gib / found['seconds']:5.2f} GiB/s,"
                f" {found['cpu']:.2f} s of CPUs; bound 1.3 x cat + 10 s = {bound:.2f} s"
            )
            print(
                f"           read {found['rchar'] / GIB:.2f} GiB, from disk"
                f" {found['read_bytes'] / GIB:.2f}; written {found['write_bytes'] / GIB:.2f};"
                f" peak {found['peak'] / GIB:.2f} GiB = weights + {found['peak'] / GIB - gib:.2f}"
            )


if __name__ == "__main__":
    main()
