"""Pictures without torchvision, of which the default package index has no build for CPUs.

transformers prepares pictures with Pillow where torchvision is missing. vLLM 0.32's models with
vision import the variants for torchvision by name, and without it not even their text parts load.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

__all__ = ["register"]

# transformers' families, with their classes for pictures and for videos. Others share them: Qwen3.5
# has Qwen2-VL's for pictures and Qwen3-VL's for videos.
PICTURES = {
    "gemma4": "Gemma4ImageProcessor",
    "glm4v": "Glm4vImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
}
MODULES = {f"transformers.models.{family}.image_processing_{family}": family for family in PICTURES}
VIDEOS = {
    "gemma4": "Gemma4VideoProcessor",
    "glm4v": "Glm4vVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}


def register() -> None:
    """Without torchvision, let vLLM find transformers' classes for Pillow in the others' places."""
    _allow_numba()
    if find_spec("torchvision") is None and not any(isinstance(f, _Pillow) for f in sys.meta_path):
        sys.meta_path.insert(0, _Pillow())


def _allow_numba() -> None:
    """vLLM prepares Kimi-K2.5's pictures with numba, and stops at its objects on CPUs.

    It looks for kernels in what every loaded module has, and numba's llvmlite has an object of
    which any attribute is a function, `__dict__` too.
    """
    dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    dispatcher.vars = _variables


def _variables(value: Any) -> Any:
    found = vars(value)
    return found if isinstance(found, dict | MappingProxyType) else {}


class _Pillow(MetaPathFinder, Loader):
    """Makes the modules for torchvision out of those for Pillow, when a model imports one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        family = MODULES[module.__name__]
        name = PICTURES[family]
        pillow = importlib.import_module(
            f"transformers.models.{family}.image_processing_pil_{family}"
        )
        public = {key: value for key, value in vars(pillow).items() if not key.startswith("__")}
        vars(module).update(public | {name: public[f"{name}Pil"]})
        _replace_videos()


def _replace_videos() -> None:
    """A model's processor has one for videos, even where only pictures come."""
    transformers = importlib.import_module("transformers")
    utilities: Any = importlib.import_module("transformers.video_processing_utils")
    for name in ("VideoProcessorMixin", "BaseVideoProcessor"):
        setattr(transformers, name, getattr(utilities, name))
    for family, name in VIDEOS.items():
        package = importlib.import_module(f"transformers.models.{family}")
        try:
            module: Any = importlib.import_module(f"{package.__name__}.video_processing_{family}")
            base = getattr(module, name)
        except NameError:  # Gemma 4's is defined in terms of torchvision
            base = utilities.BaseVideoProcessor
        found = type(name, (base,), {"preprocess": _refuse_videos})
        for where in (package, transformers):
            setattr(where, name, found)


def _refuse_videos(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "videos need torchvision (the extra `multimodal`); for pictures alone, set"
        " limit-mm-per-prompt to {video: 0}"
    )
