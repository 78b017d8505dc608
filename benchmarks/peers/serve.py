"""The process of one engine: `python -m benchmarks.peers.serve MODULE SETTINGS`."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

from benchmarks.peers.settings import Refused, Settings


class Server:
    def __init__(self, name: str, settings: Settings) -> None:
        self._name, self._settings = name, settings
        self._layers: list[Any] = []

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"benchmarks.peers.{self._name}")

    def introduce(self) -> tuple[str, tuple[str, ...]]:
        try:
            module = self._module
        except ImportError as error:
            raise Refused(f"does not run: {error}") from None
        try:
            return str(module.version()), module.FORMATS
        except ImportError as error:
            raise Refused(f"not installed: {error} (pip install {module.PACKAGE})") from None

    def release(self) -> None:
        self._layers.clear()
        gc.collect()

    def prepare(self, shape: str, format: str, layers: int, seed: int) -> None:
        import torch

        from benchmarks.cases import Shape
        from benchmarks.weights import RandomWeights

        torch.set_num_threads(self._settings.threads)
        self.release()
        for layer in range(layers):
            weights = RandomWeights(Shape.parse(shape), format, seed + layer)
            self._layers.append(self._module.prepare(weights, self._settings))
            if layer == 0:
                self._first = weights

    def batches(self, tokens: int) -> tuple[float, float]:
        from benchmarks.cases import batch, seeds
        from benchmarks.weights import input_dtype, relative_error

        shape, dtype = self._first.shape, input_dtype(self._first.format)
        self._batches = [batch(shape, tokens, seed, dtype) for seed in seeds(tokens)]
        self._token = batch(shape, 1, 0, dtype)
        out = self._module.run(self._layers[0], self._batches[0])
        error = relative_error(self._first, self._batches[0], out)
        # Some engines reorder an expert's weights when it is first used.
        for layer in self._layers:
            for routed in self._batches:
                self._module.run(layer, routed)
        return error, self._seconds(1)

    def _seconds(self, turn: int) -> float:
        layer = self._layers[turn % len(self._layers)]
        batch = self._batches[turn % len(self._batches)]
        start = time.perf_counter()
        self._module.run(layer, batch)
        return time.perf_counter() - start

    def time(self, first: int, calls: int) -> list[float]:
        # Wakes the threads, which slept or were stopped.
        self._module.run(self._layers[first % len(self._layers)], self._token)
        return [self._seconds(turn) for turn in range(first, first + calls)]


def main(name: str, settings: str) -> None:
    # A stopped process would outlive a parent that was killed: PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    server = Server(name, Settings(**json.loads(settings)))
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = {"result": getattr(server, do)(**request)}
        except Refused as reason:
            answer = {"refused": str(reason)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
