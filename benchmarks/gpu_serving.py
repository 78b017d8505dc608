"""Measures tokens per second of LvLLM with a GPU, against vLLM's own ways to offload.

    python -m benchmarks.gpu_serving [--shape qwen3-30b-a3b] [--layers 48] [--prefill 8192,32768]
        [--decode 1,4,16] [--only NAME,...] [--json FILE]

The benchmark makes a Qwen3-MoE model of that shape with dummy weights, and runs one configuration
after the other, each in a process of its own: LvLLM with no, half and all MoE layers resident and
with half of all experts in its cache, and vLLM alone with the same experts offloaded by
--offload-backend prefetch and by --cpu-offload-gb, and with none offloaded. Prompts are prefilled
one at a time, up to their first token. Decoding steps have several requests at a time, after their
prompts. The memory of the largest process on the host is shown beside what the experts take there.
The number in brackets compares with the faster of vLLM's ways to offload all experts or, if none of
them runs, with the first configuration that runs.

On vLLM's CPU platform, which offloads nothing, LvLLM's configurations run on the stand-in. That
only shows that the benchmark runs. `--shape tiny --layers 4 --prefill 48,96 --decode 1,4
--threshold 32 --vocabulary 512` takes two minutes there.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape, UserError

ROOT = Path(__file__).parents[1]
HEAD = 128
FOUND = "found "
OFFLOADED = ("vLLM, all prefetched", "vLLM, all by cpu-offload-gb")
"""The numbers in brackets compare with these configurations."""

Results = dict[str, float]
"""Tokens per second, by "prefill N" and "decode N", and GiB of memory, by HOST and PLANNED."""
HOST, PLANNED = "host, GiB", "experts on the host by plan, GiB"


def write_config(folder: Path, shape: Shape, layers: int, vocabulary: int, length: int) -> None:
    """Write the config.json of a Qwen3-MoE with the attention proportions of Qwen3-30B-A3B."""
    heads = max(2, 2 * shape.hidden // HEAD)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "head_dim": HEAD,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def configurations(
    on_gpu: bool, layers: int, expert_gib: float, threshold: int, window: int
) -> dict[str, dict[str, Any]]:
    """Return the names of configurations, and how these differ.

    "enabled" is LvLLM's switch, "planned" what its experts take on the host, in GiB, "settings" are
    its settings, and all others are arguments of `vllm.LLM`. `expert_gib` is the size of all
    experts in GiB.
    """
    offload: dict[str, Any] = {
        "gpu_prefill_min_batch_size": threshold,
        "gpu_prefetch_window": window,
    }
    if not on_gpu:
        offload["accelerator"] = "host"
    half = layers // 2
    resident = {"no": (0, ""), "half": (half, f"0-{half - 1}"), "all": (layers, f"0-{layers - 1}")}
    found: dict[str, dict[str, Any]] = {
        f"LvLLM, {name} layers resident": {
            "enabled": True,
            "planned": expert_gib * (layers - count) / layers,
            "settings": offload | {"gpu_resident_moe_layers": which},
        }
        for name, (count, which) in resident.items()
    }
    found["LvLLM, half the experts in the cache"] = {
        "enabled": True,
        "planned": expert_gib,
        "settings": offload | {"gpu_expert_cache": f"{expert_gib / 2:.6f}"},
    }
    experts = {"w13_weight", "w2_weight"}
    if on_gpu:
        for name, every, part in (("all", 1, 1.0), ("half", 2, 0.5)):
            found[f"vLLM, {name} prefetched"] = {
                "offload_backend": "prefetch",
                "offload_group_size": every,
                "offload_params": sorted(experts),
            }
            found[f"vLLM, {name} by cpu-offload-gb"] = {
                "offload_backend": "uva",
                "cpu_offload_gb": expert_gib * part,
                "cpu_offload_params": sorted(experts),
            }
    return found | {"vLLM": {}}


def run(options: dict[str, Any]) -> Results:
    """Load a model in this process, and time each length and number of requests."""
    from vllm import LLM, SamplingParams

    prefill, decode, tokens = (options.pop(key) for key in ("prefill", "decode", "tokens"))
    vocabulary, repeats = options.pop("vocabulary"), options.pop("repeats")
    for name in ("offload_params", "cpu_offload_params"):
        if name in options:
            options[name] = set(options[name])
    llm = LLM(**options)
    # Without LvLLM's entry point, this would be stock vLLM under LvLLM's name.
    worker = llm.llm_engine.vllm_config.parallel_config.worker_cls
    enabled = os.environ["LVLLM_MOE_NUMA_ENABLED"] == "1"
    if worker.startswith("lvllm.") != enabled:
        raise RuntimeError(f"the worker is {worker}, although LVLLM_MOE_NUMA_ENABLED={enabled:d}")

    def seconds(requests: int, length: int, answer: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": [(7 * i + 31 * r) % vocabulary for i in range(length)]}
            for r in range(requests)
        ]
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    found: Results = {}
    seconds(1, prefill[0], 2)
    for length in prefill:
        found[f"prefill {length}"] = length / statistics.median(
            seconds(1, length, 1) for _ in range(repeats)
        )
    for requests in decode:
        seconds(requests, 16, 4)
        step = statistics.median(
            (seconds(requests, 16, 1 + tokens) - seconds(requests, 16, 1)) / tokens
            for _ in range(repeats)
        )
        found[f"decode {requests}"] = requests / step
    found[HOST] = peak_gib()
    return found


def peak_gib() -> float:
    """Return the most memory that the largest of this process and its children has had, in GiB."""
    import psutil

    this, peaks = psutil.Process(), []
    for process in (this, *this.children(recursive=True)):
        status = Path("/proc", str(process.pid), "status").read_text()
        peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks) / (1 << 20)


def measure(name: str, options: dict[str, Any], timeout: float) -> Results | str:
    """Return the results of a configuration, or the line that says why it does not run."""
    enabled, planned = options.pop("enabled", False), options.pop("planned", None)
    settings = options.pop("settings", None)
    if settings is not None:
        options["additional_config"] = {"lvllm": settings}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LVLLM_")}
    environment |= {
        "LVLLM_MOE_NUMA_ENABLED": str(int(enabled)),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # vLLM's sampler wants FlashInfer, which a machine without a network may lack.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    print(f"{name} ...", file=sys.stderr, flush=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_serving", "--child", json.dumps(options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # vLLM's processes are ended with it.
    )
    try:
        said, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"not done after {timeout:g} s (--timeout)"
    lines = said.splitlines()
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    for line in reversed(lines):
        if line.startswith(FOUND):
            found: Results = json.loads(line.removeprefix(FOUND))
            return found if planned is None else found | {PLANNED: planned}
    errors = [line for line in lines if "Error" in line or line.startswith("lvllm:")]
    return (errors or lines or ["nothing said"])[-1].strip()


def report(results: dict[str, Results | str]) -> str:
    """Return a line for each configuration."""
    ran = {name: found for name, found in results.items() if not isinstance(found, str)}
    if not ran:
        return "\n".join(f"{name}: {why}" for name, why in results.items())
    columns = [name for name in next(iter(ran.values())) if name not in (HOST, PLANNED)]
    compared = [ran[name] for name in OFFLOADED if name in ran] or [next(iter(ran.values()))]
    best = {column: max(found[column] for found in compared) for column in columns}
    width = max(map(len, results))
    lines = ["tokens a second".ljust(width) + "".join(f"{column:>18}" for column in columns)]
    for name, found in results.items():
        if isinstance(found, str):
            lines.append(f"{name.ljust(width)}  {found}")
            continue
        cells = [f"{found[c]:.4g} ({found[c] / best[c]:.2f})" for c in columns]
        lines.append(name.ljust(width) + "".join(f"{cell:>18}" for cell in cells))
    for name, found in ran.items():
        memory = [f"{what}: {found[what]:.2f}" for what in (HOST, PLANNED) if what in found]
        lines += [f"{name.ljust(width)}  {', '.join(memory)}"] if memory else []
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="HxIxExTOP_K, or a name")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--prefill", type=numbers, default=[8192, 32768], help="tokens")
    parser.add_argument("--decode", type=numbers, default=[1, 4, 16], help="requests at once")
    parser.add_argument("--tokens", type=int, default=32, help="decoding steps that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--threshold", type=int, default=2048, help="tokens, from which on layers"
                        " are streamed")  # fmt: skip
    parser.add_argument("--window", type=int, default=1, help="layers copied ahead")
    parser.add_argument("--kv-gib", type=float, help="KV cache; default: what vLLM finds")
    parser.add_argument("--only", default="", help="parts of the names of configurations")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a configuration")
    parser.add_argument("--json", type=Path, help="results go there, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(FOUND + json.dumps(run(json.loads(a.child))))
        return
    try:
        shape = Shape.parse(a.shape)
    except UserError as error:
        raise SystemExit(str(error)) from None
    # Asked here, CUDA would not start in processes that are forked; those here are spawned.
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda()
    length = max(a.prefill, default=16) + a.tokens + 32
    common = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": length,
        "max_num_batched_tokens": min(a.chunk, length),
        "max_num_seqs": max(a.decode, default=1),
        "enforce_eager": not on_gpu,
        "prefill": a.prefill,
        "decode": a.decode,
        "tokens": a.tokens,
        "vocabulary": a.vocabulary,
        "repeats": a.repeats,
    }
    if a.kv_gib:
        common["kv_cache_memory_bytes"] = int(a.kv_gib * (1 << 30))
    expert_gib = 2 * shape.experts * shape.expert_weights * a.layers / (1 << 30)
    results: dict[str, Results | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape, a.layers, a.vocabulary, length)
        for name, more in configurations(
            on_gpu, a.layers, expert_gib, a.threshold, a.window
        ).items():
            if not a.only or any(part in name for part in a.only.split(",")):
                results[name] = measure(name, common | more | {"model": folder}, a.timeout)
                # A run that is cut off has said and kept what it knows.
                print(f"{name}: {results[name]}", flush=True)
                if a.json:
                    a.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{shape}, {a.layers} layers, experts of {expert_gib:.2f} GiB in bf16")
    print(report(results))
    if all(isinstance(found, str) for found in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
