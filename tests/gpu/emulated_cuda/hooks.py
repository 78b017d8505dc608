"""Changes modules of Triton and vLLM when they are imported."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["install"]


def install() -> None:
    """Change the modules from now on. This is for a process that has imported neither."""
    from tests.gpu.emulated_cuda import interpreter, operators

    changes: dict[str, Callable[[Any], None]] = {
        "triton.runtime.jit": interpreter.compute_kernels,
        "triton.runtime.interpreter": interpreter.repair,
        "vllm._custom_ops": operators.compute,
    }
    sys.meta_path.insert(0, _Finder(changes))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.pop(name, None)
        spec = importlib.util.find_spec(name) if change else None
        if spec is None or spec.loader is None or change is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
