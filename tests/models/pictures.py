"""How each family prepares pictures: the files in its checkpoint, and the reference's inputs."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

SIZE = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
"""The size of a picture in pixels. It is small enough for a prompt of a test."""


class Pictures(Protocol):
    """How one family prepares a picture."""

    @property
    def modality(self) -> str:
        """The name that vLLM has for this kind of input."""

    def write(self, folder: Path) -> None:
        """Write the files that vLLM's processor reads to the checkpoint in `folder`."""

    def prepare(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """Return the inputs that the model of transformers takes for a picture."""

    def tokens(self, prepared: dict[str, torch.Tensor]) -> int:
        """The number of tokens that the picture takes in a prompt."""


def _pillow(family: str, name: str) -> Any:
    """Return an image processor of transformers, as a class that needs no torchvision."""
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, name)


@dataclass(frozen=True)
class Grid:
    """Patches in a grid, of which 2 x 2 make a token. Qwen and GLM use it."""

    family: str
    name: str
    """The class of the image processor in transformers."""
    videos: str
    """The class of the video processor, which a checkpoint must have, too."""
    patch_size: int
    modality: str = "image"

    def write(self, folder: Path) -> None:
        self._images().save_pretrained(folder)
        videos = {"video_processor_type": self.videos, "size": SIZE}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))

    def prepare(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        return dict(self._images()(images=[picture], return_tensors="pt"))

    def tokens(self, prepared: dict[str, torch.Tensor]) -> int:
        return int(prepared["image_grid_thw"].prod()) // 4

    def _images(self) -> Any:
        return _pillow(self.family, self.name)(size=SIZE, patch_size=self.patch_size)


@dataclass(frozen=True)
class Pooled:
    """A fixed number of patches, of which 2 x 2 make a token. Gemma 4 uses it.

    A smaller picture leaves the last patches empty.
    """

    settings: dict[str, int]
    modality: str = "image"

    def write(self, folder: Path) -> None:
        types = {
            "processor_class": "Gemma4Processor",
            "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
            "image_processor": {"image_processor_type": "Gemma4ImageProcessor", **self.settings},
            "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
        }
        (folder / "processor_config.json").write_text(json.dumps(types))

    def prepare(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        images = _pillow("gemma4", "Gemma4ImageProcessorPil")(**self.settings)
        prepared = images(images=[picture], return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "image_position_ids")}

    def tokens(self, prepared: dict[str, torch.Tensor]) -> int:
        filled = (prepared["image_position_ids"] >= 0).all(dim=-1)
        return int(filled.sum()) // self.settings["pooling_kernel_size"] ** 2


@dataclass(frozen=True)
class Chunk:
    """A picture that keeps its size and gets a black border on the right and below.

    Kimi-K2.5 uses it. transformers needs torchvision for it and vLLM needs numba. The repository of
    the model has Python code for it, which nobody has read. So this class does it once more.
    """

    patch_size: int
    modality: str = "vision_chunk"

    def write(self, folder: Path) -> None:
        config = {
            "patch_size": self.patch_size,
            "merge_kernel_size": 2,
            "in_patch_limit": 256,
            "in_patch_limit_each_frame": 64,
            "in_patch_limit_video": 256,
            "patch_limit_on_one_side": 512,
            "fixed_output_tokens": None,
            "temporal_merge_kernel_size": 4,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": config}))

    def prepare(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        pixels = np.asarray(picture.convert("RGB"))
        token = 2 * self.patch_size
        border = [(0, -size % token) for size in pixels.shape[:2]]
        pixels = np.pad(pixels, [*border, (0, 0)])
        rows, columns = (size // self.patch_size for size in pixels.shape[:2])
        patches = torch.from_numpy(pixels / 127.5 - 1).float()
        patches = patches.reshape(rows, self.patch_size, columns, self.patch_size, 3)
        return {
            "pixel_values": patches.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous(),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    def tokens(self, prepared: dict[str, torch.Tensor]) -> int:
        return int(prepared["image_grid_thw"].prod()) // 4
