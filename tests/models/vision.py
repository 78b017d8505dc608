"""Small random checkpoints of models with vision, and the files that prepare their pictures.

python tests/models/vision.py qwen3_vl_moe OUT
"""

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.models import make as language
from tests.models.make import COMMON, UNWRITTEN, VOCABULARY, fill
from tests.models.pictures import Chunk, Grid, Pictures, Pooled

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
    """The facts that make a checkpoint of one architecture."""

    model_type: str
    tokens: dict[str, str]
    """The special tokens, each by the name of the configuration's field that has its id."""
    text: dict[str, Any]
    vision: dict[str, Any]
    pictures: Pictures
    around: tuple[str, ...]
    """The fields of the tokens that stand for a picture in a prompt."""
    more: dict[str, Any] = field(default_factory=dict)
    """Other fields of the configuration."""
    written: dict[str, Any] = field(default_factory=dict)
    """Fields that published checkpoints have, and transformers does not write so."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names that published checkpoints have for tensors, each by a pattern for another name.

    transformers writes the name of the pattern, and reads the published one.
    """
    fused: Literal["no", "rows", "columns"] = "no"
    """How published checkpoints store a projection of the experts.

    With "no", each expert has a tensor of its own. Otherwise all experts of a layer are in one
    tensor, which is [E, rows, columns] with "rows" and [E, columns, rows] with "columns".
    """


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
QWEN_PICTURES = Grid("qwen2_vl", "Qwen2VLImageProcessorPil", "Qwen3VLVideoProcessor", 16)
QWEN_AROUND = ("vision_start_token_id", "image_token_id", "vision_end_token_id")

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
        pictures=QWEN_PICTURES,
        around=QWEN_AROUND,
        fused="columns",
    ),
    "qwen3_5_moe": Vision(
        model_type="qwen3_5_moe",
        tokens=QWEN_TOKENS,
        text={
            "num_hidden_layers": 4,  # three layers of Gated DeltaNet, one of attention
            **LINEAR_ATTENTION,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 80,
            "shared_expert_intermediate_size": 96,
            "head_dim": 64,
            **mrope(0.25, [3, 3, 2], mrope_interleaved=True),
        },
        vision=QWEN_VISION,
        pictures=QWEN_PICTURES,
        around=QWEN_AROUND,
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
        pictures=Grid("glm4v", "Glm4vImageProcessorPil", "Glm4vVideoProcessor", 14),
        around=("image_start_token_id", "image_token_id", "image_end_token_id"),
    ),
    "gemma4": Vision(
        model_type="gemma4",
        tokens={
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "boa_token_id": "<|audio>",
            "eoa_token_index": "<audio|>",
            "audio_token_id": "<|audio|>",
        },
        text={
            **language.ARCHITECTURES["gemma4"][1],
            "sliding_window": 80,  # longer than a picture, shorter than a prompt with its answer
            "use_bidirectional_attention": "vision",
        },
        vision={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "default_output_length": 70,
            "position_embedding_size": 96,
        },
        pictures=Pooled({"max_soft_tokens": 70, "patch_size": 8, "pooling_kernel_size": 2}),
        around=("image_token_id",),  # vLLM adds the other two tokens
    ),
    "kimi_k25": Vision(
        model_type="kimi_k25",
        tokens={
            "vision_start_token_id": "<|media_begin|>",
            "vision_end_token_id": "<|media_end|>",
            "image_token_id": "<|media_pad|>",
            "video_token_id": "<|kimi_k25_video_placeholder|>",
        },
        text={**language.ARCHITECTURES["kimi_k2"][1], "model_type": "kimi_k2"},
        vision={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        pictures=Chunk(14),
        around=("vision_start_token_id", "image_token_id", "vision_end_token_id"),
        more={"projection_hidden_size": 64},
        written={
            "architectures": ["KimiK25ForConditionalGeneration"],
            "use_unified_vision_chunk": True,
        },
        renamed={
            r"^language_model\.model\.blocks\.": "language_model.model.layers.",
            r"^vision_tower\.encoder\.patch_embed\.": "vision_tower.patch_embed.",
            r"^model\.mm_projector\.": "mm_projector.",
        },
    ),
}


def make(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Write a bfloat16 checkpoint of `architecture` to `folder`, with its picture processors."""
    how = ARCHITECTURES[architecture]
    ids = {name: token(architecture, name) for name in how.tokens}
    text = {**COMMON, **how.text}
    config = transformers.AutoConfig.for_model(
        how.model_type,
        text_config=text,
        vision_config=how.vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **how.more,
        **ids,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    fill(model)
    for name, weight in model.named_parameters():
        if re.search(r"(merger.*(linear_fc2|down_proj)|mm_projector.out_proj)\.weight$", name):
            weight.data.mul_(4)  # or a picture would count less than the words around it
        elif re.search(r"(patch_embedder.input_proj|embedding_projection)\.weight$", name):
            weight.data.mul_(weight.shape[-1] ** -0.5)  # `fill` took it for an embedding
        elif how.model_type == "gemma4" and name.endswith("q_norm.weight"):
            weight.data.fill_(weight.numel() ** -0.5)  # training would set the scores' scale
        elif weight.shape[0] == VOCABULARY:
            weight.data[FIRST_SPECIAL:] = 0  # no answer has the placeholder of a picture
    model.to(torch.bfloat16).save_pretrained(folder)
    _complete_config(folder / "config.json", how)
    tokenizer(how.tokens).save_pretrained(folder)
    how.pictures.write(folder)
    _rename(folder / "model.safetensors", how.renamed)
    _fuse(folder / "model.safetensors", how.fused)
    return folder


def _complete_config(file: Path, how: Vision) -> None:
    """Add the fields that transformers leaves out, or writes otherwise than publishers do."""
    config = json.loads(file.read_text()) | how.written
    names = (*UNWRITTEN, "model_type")
    config["text_config"] |= {name: how.text[name] for name in names if name in how.text}
    file.write_text(json.dumps(config, indent=2))


def _rename(file: Path, renamed: dict[str, str]) -> None:
    if not renamed:
        return
    tensors = load_file(file)
    for pattern, name in renamed.items():
        assert any(re.search(pattern, key) for key in tensors), f"{pattern}: nothing to rename"
        tensors = {re.sub(pattern, name, key): data for key, data in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


def _fuse(file: Path, how: str) -> None:
    """Put all experts of a layer into one tensor for gate and up, and into one for down.

    transformers holds them like this, but does not save them like this.
    """
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
    """The ids of the tokens that stand for a picture in a prompt."""
    return [token(architecture, name) for name in ARCHITECTURES[architecture].around]


def tokenizer(special: dict[str, str]) -> Any:
    """Make a tokenizer with a word for each id. `special` has the ids from FIRST_SPECIAL on."""
    words = [f"w{i}" for i in range(VOCABULARY)]
    words[FIRST_SPECIAL : FIRST_SPECIAL + len(special)] = special.values()
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens(list(special.values()))
    names = {re.sub("_(id|index)$", "", name): word for name, word in special.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="w2", pad_token="w0", extra_special_tokens=names
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=sorted(ARCHITECTURES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make(arguments.architecture, arguments.folder, arguments.seed))
