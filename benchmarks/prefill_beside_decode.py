"""Estimate how much a long prefill slows down decoding requests, for five ways to run both.

    python -m benchmarks.prefill_beside_decode [--bus 55] [--read 300] [--cpu 3] [--gpu 600] ...

Nothing is run: the times are computed from bytes and operations. The experts are on the host, and
decoding computes them there. A prefill computes them there as well, or on the GPU, to which every
layer is copied once for each chunk. Attention and everything else runs on the GPU; it takes a fixed
time per layer of a decoding step, and as long as its operations take in a prefill.

- chunks: vLLM's scheduler as it is. A step computes one chunk of the prompt and one token of each
  other request. The chunk's experts are streamed.
- budget: chunks are so small that a step keeps within a time budget. Their experts are computed on
  the host.
- slices: the prefill is suspended between layers, so that decoding steps run while the next layers
  are copied. Both take turns on the GPU.
- engines: two processes on one GPU share the weights on the host. They take turns on the GPU as
  above, and the prompt's keys and values are copied once.
- engines, 2 GPUs: each engine has a GPU.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The sizes of a model. The defaults are those of Qwen3-30B-A3B."""

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 768
    dense: float = 1.4e9
    """Number of weights outside the experts, all of them on the GPU."""
    kv_bytes: int = 98304
    """Bytes of keys and values for each token."""

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    def distinct(self, tokens: float) -> float:
        """How many experts of a layer this many tokens choose, if they choose evenly."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


MODELS = {
    "Qwen3-30B-A3B": Model(),
    "DeepSeek-V3": Model(58, 256, 8, 7168, 2048, 17e9, 70272),
}


@dataclass(frozen=True)
class Machine:
    bus: float
    """Bytes a second from the host to the GPU."""
    read: float
    """Bytes a second that the CPUs read from the host's memory."""
    cpu: float
    """Operations a second of the experts on the CPUs."""
    gpu: float
    """Operations a second of matrix products on the GPU."""
    step: float
    """Seconds per layer of a decoding step for all but the experts: attention, the router, and the
    way to the host and back."""


@dataclass(frozen=True)
class Way:
    name: str
    decode: float
    """Seconds between two tokens of a running request during the prefill."""
    prefill: float
    """Seconds until the prompt's first token."""


def ways(
    model: Model,
    machine: Machine,
    bits: float,
    prompt: int,
    chunk: int,
    running: int,
    budget: float,
) -> tuple[float, list[Way]]:
    """Seconds of a decoding step without a prefill, and the estimate for each way."""
    layer_bytes = model.experts * model.expert_weights * bits / 8
    read = model.distinct(running) * model.expert_weights * bits / 8

    def decode(rate: float) -> float:
        return model.layers * (read / rate + machine.step)

    alone = decode(machine.read)
    copy = model.layers * layer_bytes / machine.bus

    def gpu(tokens: int) -> float:
        """Seconds for a chunk on the GPU, with experts and everything else."""
        weights = model.layers * model.top_k * model.expert_weights + model.dense
        return 2 * weights * tokens / machine.gpu

    chunks = -(-prompt // chunk)
    work = gpu(prompt)
    streamed = chunks * max(copy, gpu(chunk))

    operations = 2 * model.layers * model.top_k * model.expert_weights
    tokens = (budget - 1) * alone / (operations / machine.cpu + gpu(1))
    small = Way("budget", budget * alone, prompt / tokens * budget * alone)

    # While weights are copied, the CPUs can read that much less.
    beside = decode(machine.read - machine.bus)
    busy = work / streamed  # The share of the time in which the GPU computes the prefill.
    own = model.layers * machine.step  # The time that a decoding step needs the GPU, at most.
    shared = beside + busy * own
    slowed = streamed * (1 + min(own / beside, 1) * busy)
    kv = prompt * model.kv_bytes / machine.bus
    return alone, [
        Way("chunks", max(copy, gpu(chunk)), streamed),
        small,
        Way("slices", shared, slowed),
        Way("engines", shared, slowed + kv),
        Way("engines, 2 GPUs", beside, streamed + kv),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bus", type=float, default=55, help="GB/s")
    parser.add_argument("--read", type=float, default=300, help="GB/s of the host's memory")
    parser.add_argument("--cpu", type=float, default=10, help="TFLOP/s")
    parser.add_argument("--gpu", type=float, default=600, help="TFLOP/s")
    parser.add_argument("--step", type=float, default=120, help="us per layer of a decoding step")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--running", type=int, default=4, help="requests that are decoding")
    parser.add_argument(
        "--budget", type=float, default=1.5, help="longest step, in steps without a prefill"
    )
    a = parser.parse_args()
    machine = Machine(a.bus * 1e9, a.read * 1e9, a.cpu * 1e12, a.gpu * 1e12, a.step * 1e-6)
    for name, model in MODELS.items():
        for bits in (16, 8, 4.5):
            alone, found = ways(model, machine, bits, a.prompt, a.chunk, a.running, a.budget)
            print(f"\n{name}, {bits:g} bits: {a.running} requests decode at {1e3 * alone:.1f} ms")
            print(f"{'':18}{'decode':>10}{'times':>8}{'prefill':>10}{'times':>8}")
            fastest = found[0].prefill
            for way in found:
                print(
                    f"{way.name:18}{1e3 * way.decode:7.1f} ms{way.decode / alone:8.2f}"
                    f"{way.prefill:8.1f} s{way.prefill / fastest:8.2f}"
                )


if __name__ == "__main__":
    main()
