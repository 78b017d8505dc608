"""A plan as people read it."""

from lvllm.planning.choice import Candidate, Plan, cache_of
from lvllm.planning.cpu_time import Seconds
from lvllm.planning.machine import Machine
from lvllm.planning.placement import resident_layers
from lvllm.planning.settings import as_command, as_yaml, settings_of, unserved
from lvllm.planning.shape import ModelShape
from lvllm.planning.speed import limit
from lvllm.units import amount, ranges

__all__ = ["lines"]


def lines(result: Plan) -> list[str]:
    """The plan as plain text, which has the same lines in a terminal and in a file."""
    found = ["Model", *_pairs(_model(result.model))]
    found += ["", "Machine", *_pairs(_machine(result.machine))]
    found += ["", "Ways to run it, the fastest first", *_ways(result)]
    best = result.best
    if best is None:
        return [*found, "", "The model does not fit on this machine."]
    load = best.load
    found += ["", f"Memory: {best.name}", *_memory(result, best)]
    found += ["", f"A prompt of {load.prompt} tokens, in seconds", *_parts(best.speed.prefill)]
    found += [
        "",
        f"A token for each of {load.users} user{'s' * (load.users > 1)}, in seconds",
        *_parts(best.speed.decode),
    ]
    found += ["", *_start(result, best)]
    if result.machine.gpus and not best.how.on_gpu:
        found += ["", "This needs LvLLM's build for CPUs: docs/install.md."]
    return found


def _start(result: Plan, best: Candidate) -> list[str]:
    """The settings and, unless LvLLM does not serve the model's files, the commands."""
    chosen = settings_of(result.model, result.machine, best)
    if unserved(result.model):
        settings = [f"    {line}" for line in as_yaml(None, chosen).splitlines()]
        return ["Settings for that checkpoint; a GGUF file has no command", "", *settings]
    name = result.model.name
    file = [f"    {line}" for line in as_yaml(name, chosen).splitlines()]
    return [
        *("config.yaml", "", *file),
        *("", "    LVLLM_MOE_NUMA_ENABLED=1 vllm serve --config config.yaml"),
        *("", "Or in one line", "", f"    {as_command(name, chosen)}"),
    ]


def _pairs(rows: dict[str, str]) -> list[str]:
    return [f"  {name:<24}{text}" for name, text in rows.items()]


def _model(model: ModelShape) -> dict[str, str]:
    bits = model.bits
    experts = {layer.experts for layer in model.moe_layers}
    numbers = "/".join(map(str, sorted(experts)))
    found = {
        "name": model.name,
        "weights": f"{_count(model.routed + model.others)}, {_count(model.active)} for a token",
        "layers": f"{len(model.layers)}, of which {len(model.moe_layers)} have {numbers} experts;"
        f" a token takes {max(layer.chosen for layer in model.moe_layers)}",
        "experts": f"{amount(model.routed * bits.experts / 8)}, {bits.format},"
        f" {bits.experts:.2f} bits a weight",
        "other weights": f"{amount(model.others * bits.others / 8)},"
        f" {bits.others:.2f} bits a weight",
        "longest context": f"{model.context} tokens",
    }
    if model.stored is not None:
        stored = model.stored
        found["GGUF file"] = (
            f"experts in {' and '.join(stored.types)}, {stored.bits:.2f} bits a weight"
        )
        if (note := unserved(model)) is not None:
            found["note"] = note
    return found


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"


def _machine(machine: Machine) -> dict[str, str]:
    gpu = machine.gpu
    found = {
        "cores": f"{machine.cores} on {machine.nodes} NUMA node{'s' * (machine.nodes > 1)}",
        "memory": f"{amount(machine.memory_bytes)}, read at {machine.read_gb_per_s:.0f} GB/s",
        "GPUs": "none",
    }
    if gpu is not None:
        found["GPUs"] = (
            f"{machine.gpus} x {amount(gpu.memory_bytes)}, as fast as {gpu.name}, read host memory"
            f" at {gpu.bus_gb_per_s:.0f} GB/s"
        )
        found["note"] = "LvLLM has not run on a GPU yet: all times of GPUs are estimates"
    return found


def _ways(result: Plan) -> list[str]:
    rows = [("", "prefill", "decode", "fits")]
    for one in result.candidates:
        rows.append(
            (
                one.name,
                f"{one.speed.prefill_rate:.0f} tok/s",
                f"{one.speed.decode_rate:.1f} tok/s",
                f"no: {one.memory.lacks}" if one.memory.lacks else "yes",
            )
        )
    return [f"  {a:<24}{b:>14}{c:>14}   {d}".rstrip() for a, b, c, d in rows]


def _memory(result: Plan, best: Candidate) -> list[str]:
    places = {"each GPU": best.memory.card, "host": best.memory.host}
    if result.machine.nodes > 1:
        places["fullest node"] = best.memory.node
    rows = {
        place: f"{amount(sum(parts.values()))}: "
        + ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if size)
        for place, parts in places.items()
        if parts
    }
    moe = result.model.moe_layers
    kept = resident_layers(result.model, best.how.resident)
    where = {"experts on the GPU": kept, "experts on the host": moe[len(kept) :]}
    for name, some in where.items():
        if some and (best.how.on_gpu or name.endswith("host")):
            rows[name] = f"layers {ranges([layer.number for layer in some])}"
    if cache := cache_of(result, best):
        rows["experts in the cache"] = (
            f"{cache.experts} of {cache.of}, which are taken to save {cache.saved:.0%} of the"
            " reads of a token"
        )
    return _pairs(rows)


def _parts(seconds: Seconds) -> list[str]:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    shown = {
        name: f"{one:10.4f}{'   (the limit)' if name == limit(seconds) else ''}"
        for name, one in ordered
    }
    return [f"  {name:<40}{text}" for name, text in shown.items()]
