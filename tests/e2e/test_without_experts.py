"""Models without experts run as with stock vLLM, although LvLLM is enabled."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.e2e.generate import DEFAULTS, ONE_PROCESS, call
from tests.models.make import COMMON, VOCABULARY, fill
from tests.models.vision import FIRST_SPECIAL, tokenizer

SIZES = {**COMMON, "num_hidden_layers": 2}
SPEECH = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
SOUND = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
SAMPLES = 16000


def llama(folder: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer({}).save_pretrained(folder)  # vLLM's pooling models want one


def whisper(folder: Path) -> None:
    """It has a decoder of text, and cross-attention to an encoder of 50 positions."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=80,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        d_model=128,
        max_source_positions=50,
        max_target_positions=64,
        decoder_start_token_id=FIRST_SPECIAL,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    tokenizer({name: name for name in SPEECH}).save_pretrained(folder)


def qwen2_audio(folder: Path) -> None:
    """It hears: the features of an encoder stand for tokens in the prompt of a language model."""
    encoder = {
        "num_mel_bins": 80,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 192,
        "d_model": 128,
        "max_source_positions": 1500,  # vLLM wants 30 seconds, most of them padding
    }
    config = transformers.Qwen2AudioConfig(
        audio_config=encoder,
        text_config={"model_type": "qwen2", **SIZES},
        audio_token_id=FIRST_SPECIAL,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(),
        tokenizer({name: name for name in SOUND}),
    ).save_pretrained(folder)
    # transformers reads the published names, but writes others.
    file = folder / "model.safetensors"
    published = {
        name.replace("model.model.", "model."): data for name, data in load_file(file).items()
    }
    save_file(published, file, {"format": "pt"})


def answer(folder: str, result: str) -> None:
    """In a forked process: what each model says."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    greedy = SamplingParams(
        temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False
    )
    draw = random.Random(7)
    prompts: Any = [
        {"prompt_token_ids": [draw.randrange(3, FIRST_SPECIAL) for _ in range(n)]} for n in (3, 18)
    ]
    sound = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(7)).numpy()
    spoken: Any = {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (sound, SAMPLES)}},
        "decoder_prompt": {"prompt_token_ids": [*range(FIRST_SPECIAL, FIRST_SPECIAL + 4)]},
    }
    heard: Any = {
        "prompt_token_ids": [3, 4, FIRST_SPECIAL + 1, FIRST_SPECIAL, FIRST_SPECIAL + 2, 5],
        "multi_modal_data": {"audio": (sound, SAMPLES)},
    }
    plain = DEFAULTS | {"model": f"{folder}/llama", "skip_tokenizer_init": False}

    def tokens(asked: Any, **arguments: Any) -> Any:
        llm = LLM(**plain | arguments)
        return [
            (list(one.outputs[0].token_ids), one.outputs[0].cumulative_logprob)
            for one in llm.generate(asked, greedy, use_tqdm=False)
        ]

    def embeddings(asked: Any) -> Any:
        llm = LLM(**plain | {"runner": "pooling", "convert": "embed"})
        return [one.outputs.embedding for one in llm.embed(asked, use_tqdm=False)]

    said = [tokens(prompts)]
    cleanup_dist_env_and_memory()
    said.append(embeddings(prompts))
    cleanup_dist_env_and_memory()
    said.append(tokens([spoken], model=f"{folder}/whisper", max_model_len=64))
    cleanup_dist_env_and_memory()
    said.append(tokens([heard, *prompts], model=f"{folder}/qwen2_audio"))
    Path(result).write_text(json.dumps(said))


def test_models_without_experts(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    llama(tmp_path / "llama")
    whisper(tmp_path / "whisper")
    qwen2_audio(tmp_path / "qwen2_audio")
    said = []
    for enabled in (False, True):
        log, result = tmp_path / f"log{enabled}", tmp_path / f"result{enabled}"
        with log.open("w") as file:
            call(
                answer,
                str(tmp_path),
                str(result),
                log=file,
                enabled=enabled,
                environment=ONE_PROCESS,
            )
        assert "LvLLM" not in log.read_text()
        said.append(json.loads(result.read_text()))
    assert said[0] == said[1]
    assert [len(answers) for answers in said[1]] == [2, 2, 1, 3]
