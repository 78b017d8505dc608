"""Pictures without torchvision, of which the default package index has no build for CPUs.

transformers prepares pictures with Pillow where torchvision is missing. vLLM's models with vision
import the classes for torchvision by name, and without it not even their text parts load.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

from lvllm.faults import process
from lvllm.patches import registry
from lvllm.patches.registry import NOTHING, PICTURE_MODEL_IMPORTED, Unless, patch

__all__ = ["find_pillow_modules", "skip_strange_objects"]

# transformers' families with their classes for pictures and for videos. Other families share them:
# Qwen3.5 has the class of Qwen2-VL for pictures and that of Qwen3-VL for videos.
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

WITH_TORCHVISION = Unless("torchvision is installed", lambda: find_spec("torchvision") is not None)
WITHOUT_MIXIN = Unless(
    "torchvision is installed, or transformers, before 5.19, has no such class",
    lambda: WITH_TORCHVISION.holds() or not hasattr(_utilities(), "VideoProcessorMixin"),
)
TORCHVISION_OPTIONAL = "vLLM's models import the classes of transformers for Pillow"


@patch(
    "vllm.triton_utils.dispatcher:vars",
    signature=NOTHING,
    why="vLLM's search for kernels calls `vars` on every object in the loaded modules. It stops at"
    " an object of numba's llvmlite that has a function for every attribute, `__dict__` too. vLLM"
    " prepares Kimi-K2.5's pictures with numba.",
    upstream="none, because nothing was proposed yet",
    until="vLLM's search passes objects whose `__dict__` is no mapping",
    platform="cpu",
    unless=Unless(
        "vLLM, before 0.31, has no such search",
        lambda: find_spec("vllm.triton_utils.dispatcher") is None,
    ),
)
def skip_strange_objects(original: Any) -> Any:
    def variables(value: Any) -> Any:
        found = vars(value)
        return found if isinstance(found, dict | MappingProxyType) else {}

    return variables


@patch(
    "sys:meta_path",
    signature="list",
    why="vLLM's models for pictures import transformers' modules for torchvision. Without it these"
    " modules are made from the ones for Pillow.",
    upstream="none, because nothing was proposed yet; draft: docs/upstream/pillow-pictures.md",
    until=TORCHVISION_OPTIONAL,
    checked=("3.11",),
    platform="cpu",
    unless=WITH_TORCHVISION,
)
def find_pillow_modules(original: Any) -> Any:
    return [_PillowModules(), *original]


class _PillowModules(MetaPathFinder, Loader):
    """Finds the modules for torchvision, and fills them from the ones for Pillow."""

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
        with process.refusing():
            registry.install("cpu", PICTURE_MODEL_IMPORTED)


def _declare(
    target: str,
    signature: str,
    make: Callable[[Any], Any],
    unless: Unless = WITH_TORCHVISION,
) -> None:
    """Declare the replacement of one of transformers' names for videos."""
    patch(
        target,
        signature=signature,
        why="A model's processor has a part for videos, even where only pictures come. Without"
        " torchvision transformers has placeholders there, which vLLM's models cannot use.",
        upstream="none, because nothing was proposed yet; draft: docs/upstream/pillow-pictures.md",
        until=TORCHVISION_OPTIONAL,
        checked=("5.17.0", "5.19.0"),
        platform="cpu",
        when=PICTURE_MODEL_IMPORTED,
        unless=unless,
    )(make)


def _declare_all() -> None:
    def from_utilities(name: str) -> Callable[[Any], Any]:
        return lambda _: getattr(_utilities(), name)

    def refusing(family: str) -> Callable[[Any], Any]:
        return lambda _: _refusing_processor(family)

    mixin = "VideoProcessorMixin"
    _declare(f"transformers:{mixin}", NOTHING, from_utilities(mixin), WITHOUT_MIXIN)
    _declare("transformers:BaseVideoProcessor", "DummyObject", from_utilities("BaseVideoProcessor"))
    for family, name in VIDEOS.items():
        for package in (f"transformers.models.{family}", "transformers"):
            _declare(f"{package}:{name}", "DummyObject", refusing(family))


_declare_all()


def _utilities() -> Any:
    return importlib.import_module("transformers.video_processing_utils")


@cache
def _refusing_processor(family: str) -> type:
    """Return a class for the family's videos that refuses them, in one line."""
    name = VIDEOS[family]
    try:
        module = importlib.import_module(f"transformers.models.{family}.video_processing_{family}")
        base = getattr(module, name)
    except NameError:  # Gemma 4's is defined in terms of torchvision
        base = _utilities().BaseVideoProcessor
    return type(name, (base,), {"preprocess": _refuse_videos})


def _refuse_videos(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "videos need torchvision (the extra `multimodal`); for pictures alone, set"
        " limit-mm-per-prompt to {video: 0}"
    )
