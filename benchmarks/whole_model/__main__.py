"""The speed of a whole model: LvLLM beside llama.cpp and stock vLLM, on the same weights.

    python -m benchmarks.whole_model --folder FOLDER [--peer-python llama.cpp=PYTHON]

The model has Qwen3-30B-A3B's widths and random weights, written once as safetensors in bf16 and as
GGUF (4-bit experts, 8 bits for all else). LvLLM rounds it to the same bits while loading. Engines
run one after the other, each in a process of its own with as many threads. Prefill is one prompt;
decoding is measured behind that prompt, for each number of users. Each user's answer repeats a
token of its own: what a random model would say differs between engines, and with it how many
experts a step reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.whole_model.shape import Shape
from benchmarks.whole_model.write import GGUF, write

LVLLM = {
    "LVLLM_MOE_NUMA_ENABLED": "1",
    "LVLLM_MOE_USE_WEIGHT": "INT4",
    "LVLLM_DENSE_WEIGHT": "INT8",
}
ENGINES = {
    "lvllm": LVLLM,
    "lvllm-dense-bf16": LVLLM | {"LVLLM_DENSE_WEIGHT": "KEEP"},
    "stock": {"LVLLM_MOE_NUMA_ENABLED": "0"},
    "llama.cpp": {},
}


def main(
    folder: Annotated[Path, typer.Option(help="Where the model is, or is written (10 GB).")],
    engine: Annotated[str, typer.Option(help=f"Some of {', '.join(ENGINES)}.")] = "lvllm,llama.cpp",
    peer_python: Annotated[
        str, typer.Option(help="llama.cpp=PYTHON: the interpreter that has llama-cpp-python.")
    ] = f"llama.cpp={sys.executable}",
    layers: Annotated[int, typer.Option(help="How many layers the model has.")] = 5,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    users: Annotated[str, typer.Option(help="How many answer at a time.")] = "1,4,16",
    steps: Annotated[int, typer.Option(help="Decoding steps that are timed.")] = 24,
    repeat: Annotated[int, typer.Option(help="Repetitions; the best one counts.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of each engine.")] = os.cpu_count() or 1,
    compilation: Annotated[str, typer.Option(help="NONE or VLLM_COMPILE.")] = "NONE",
) -> None:
    """Print tokens a second of each engine, for prefill and for decoding."""
    counts = [int(count) for count in users.split(",")]
    write(Shape(layers=layers), folder)
    asked: dict[str, Any] = {
        "folder": str(folder),
        "gguf": str(folder / GGUF),
        "prompt": prompt,
        "users": counts,
        "steps": steps,
        "repeat": repeat,
        "threads": threads,
        "compilation": compilation,
    }
    table = Table("engine", "prefill", *(f"decode, {count}" for count in counts))
    for name in engine.split(","):
        seconds = measure(name, asked, peer_python.partition("=")[2])
        decode = (f"{n / seconds['decode'][str(n)]:.1f}" for n in counts)
        table.add_row(name, f"{prompt / seconds['prefill']:.0f}", *decode)
        print(name, seconds, flush=True)  # in case a later engine fails
    Console().print("Tokens a second, of all users together:", table)


def measure(engine: str, asked: dict[str, Any], peer_python: str) -> dict[str, Any]:
    """Run one of `ENGINES` in a process of its own, and return its seconds."""
    if engine not in ENGINES:
        raise typer.BadParameter(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    llama = engine == "llama.cpp"
    module = "llama_engine" if llama else "vllm_engine"
    threads = str(asked["threads"])
    environment = os.environ | ENGINES[engine] | {"OMP_NUM_THREADS": threads}
    if engine.startswith("lvllm"):
        environment["LK_THREADS"] = threads
    command = [peer_python if llama else sys.executable, "-m", f"benchmarks.whole_model.{module}"]
    # A file, because engines print to stdout as they like.
    with tempfile.NamedTemporaryFile("w+") as result:
        code = subprocess.call([*command, json.dumps(asked), result.name], env=environment)
        if code != 0:
            raise SystemExit(f"{engine} ended with exit code {code}")
        seconds: dict[str, Any] = json.load(result)
    return seconds


if __name__ == "__main__":
    typer.run(main)
