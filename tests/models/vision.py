"""Small random checkpoints of models with vision, with what prepares their pictures.

python tests/models/vision.py qwen3_vl_moe OUT
"""

import argparse
import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.models.make import COMMON, VOCABULARY, fill

FIRST_SPECIAL = VOCABULARY - 8
"""Special tokens have the last ids."""

LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def mrope(partial: float, section: list[int], **more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": partial,
            "mrope_section": section,
            **more,
        }
    }


@dataclass(frozen=True)
class Vision:
    """One architecture."""

    model_type: str
    tokens: dict[str, str]
    """By the name of the field that has its id: special tokens."""
    text: dict[str, Any]
    vision: dict[str, Any]
    images: tuple[str, str]
    """Family and class of what prepares pictures with Pillow, of transformers."""
    before: str
    """The field of the token that a picture begins with, and of the one that it ends with."""
    after: str
    videos: str
    """The name of what prepares its videos."""
    fused: Literal["no", "rows", "columns"] = "no"
    """How published checkpoints have experts: as a tensor each; or all of a layer's in one tensor,
    [E, rows, columns] or [E, columns, rows] of a projection."""


QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}

ARCHITECTURES = {
    "qwen3_vl_moe": Vision(
        model_type="qwen3_vl_moe",
        tokens=QWEN_TOKENS,
        text={
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 80,
            "head_dim": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            **mrope(1.0, [6, 5, 5], mrope_interleaved=True),
        },
        vision={**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        images=("qwen2_vl", "Qwen2VLImageProcessorPil"),
        before="vision_start_token_id",
        after="vision_end_token_id",
        videos="Qwen3VLVideoProcessor",
        fused="columns",
    ),
    "qwen3_5_moe": Vision(
        model_type="qwen3_5_moe",
        tokens=QWEN_TOKENS,
        text={
            "num_hidden_layers": 4,  # three of Gated DeltaNet, one of attention
            **LINEAR_ATTENTION,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 80,
            "shared_expert_intermediate_size": 96,
            "head_dim": 64,
            **mrope(0.25, [3, 3, 2], mrope_interleaved=True),
        },
        vision=QWEN_VISION,
        images=("qwen2_vl", "Qwen2VLImageProcessorPil"),
        before="vision_start_token_id",
        after="vision_end_token_id",
        videos="Qwen3VLVideoProcessor",
        fused="rows",
    ),
    "glm4v_moe": Vision(
        model_type="glm4v_moe",
        tokens={
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
        },
        text={
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 72,
            "first_k_dense_replace": 1,
            "head_dim": 32,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": False,
            **mrope(0.5, [4, 2, 2]),
        },
        vision={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "image_size": 112,
            "out_hidden_size": 128,
        },
        images=("glm4v", "Glm4vImageProcessorPil"),
        before="image_start_token_id",
        after="image_end_token_id",
        videos="Glm4vVideoProcessor",
    ),
}


def make(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Write a bfloat16 checkpoint of `architecture` to `folder`, with its processors."""
    how = ARCHITECTURES[architecture]
    ids = {name: token(architecture, name) for name in how.tokens}
    config = transformers.AutoConfig.for_model(
        how.model_type,
        text_config={**COMMON, **how.text},
        vision_config=how.vision,
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    fill(model)
    for name, weight in model.named_parameters():
        if re.search(r"merger.*(linear_fc2|down_proj)\.weight$", name):
            weight.data.mul_(4)  # or a picture would count for less than the words around it
        elif name == "lm_head.weight":
            weight.data[FIRST_SPECIAL:] = 0  # no answer has the placeholder of a picture
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer(list(how.tokens.values())).save_pretrained(folder)
    images(architecture).save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    videos = {"video_processor_type": how.videos, "size": size}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    _fuse(folder / "model.safetensors", how.fused)
    return folder


def _fuse(file: Path, how: str) -> None:
    """Put a layer's experts into one tensor, as transformers holds them and does not save them."""
    if how == "no":
        return
    tensors = load_file(file)
    layers: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for name in list(tensors):
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            layers.setdefault(match[1], {})[match[3], int(match[2])] = tensors.pop(name)
    for stem, of_layer in layers.items():
        experts = range(len(of_layer) // 3)
        tensors[f"{stem}.down_proj"] = torch.stack([of_layer["down", e] for e in experts])
        tensors[f"{stem}.gate_up_proj"] = torch.stack(
            [torch.cat((of_layer["gate", e], of_layer["up", e])) for e in experts]
        )
    if how == "columns":
        for name in tensors:
            if re.search(r"\.experts\.(gate_up|down)_proj$", name):
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})


def token(architecture: str, name: str) -> int:
    """The id of a special token, by the name of its field."""
    return FIRST_SPECIAL + list(ARCHITECTURES[architecture].tokens).index(name)


def around_a_picture(architecture: str) -> list[int]:
    """What stands for a picture in a prompt."""
    how = ARCHITECTURES[architecture]
    return [token(architecture, name) for name in (how.before, "image_token_id", how.after)]


def tokenizer(special: list[str]) -> Any:
    """A word for each id, and `special` from FIRST_SPECIAL on."""
    words = [f"w{i}" for i in range(VOCABULARY)]
    words[FIRST_SPECIAL : FIRST_SPECIAL + len(special)] = special
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2")


def images(architecture: str) -> Any:
    """What prepares the architecture's pictures, with Pillow."""
    how = ARCHITECTURES[architecture]
    family, name = how.images
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return getattr(module, name)(size=size, patch_size=how.vision.get("patch_size", 14))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=sorted(ARCHITECTURES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make(arguments.architecture, arguments.folder, arguments.seed))
