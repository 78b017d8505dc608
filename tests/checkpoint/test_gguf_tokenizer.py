"""Tokenizers of GGUF files, compared with those of their models and with SentencePiece."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from lvllm.checkpoint.gguf.folder import cache, configuration, present
from lvllm.checkpoint.gguf.tokenizer import write_tokenizer
from lvllm.checkpoint.gguf_headers import open_gguf
from tests.checkpoint.test_gguf import SIZES, TINY, q8_0, refusal
from tests.models.gguf import write
from tests.models.make import make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("tiny") / "tiny.gguf", q8_0)


def test_words_are_found_as_by_the_models_own_tokenizer(tiny: Path) -> None:
    folder = present(tiny, tokenizer=True)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    for text in (
        "What is 3 + 4?",
        "Sort:  cat, dog\n\n and 1 - 1 = 0",
        "<|user|>Hello there.<|end|>",
    ):
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    chat = [{"role": "user", "content": "Hello"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **asked) == theirs.apply_chat_template(chat, **asked)
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 4}


def test_a_turn_ends_with_a_token_of_its_own(tiny: Path) -> None:
    header = open_gguf(tiny)
    for name, number in (("eot", 5), ("eom", 4)):
        header.fields[f"tokenizer.ggml.{name}_token_id"] = number
    assert configuration(header)["eos_token_id"] == [4, 5]


def test_merges_and_words_of_a_user(tmp_path: Path) -> None:
    """Merges as Qwen2's, digits one by one, and words that are found before a text is cut."""
    words = [*gguf_bytes(), "lo", "wer", "er", "w er", "12", "<think>", "<|end|>"]
    file = vocabulary(
        tmp_path / "x.gguf",
        words,
        kinds={"<think>": 4, "<|end|>": 3},
        merges=["l o", "e r", "w er", "1 2"],
        pre="qwen2",
    )
    folder = present_tokenizer(file, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cut = [tokenizer.decode([one]) for one in tokenizer("lower12<think>\n<|end|>").input_ids]
    assert cut == ["lo", "wer", "1", "2", "<think>", "\n", "<|end|>"]
    ids = tokenizer("<think><|end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"
    composed, apart = tokenizer("é").input_ids, tokenizer("e\u0301").input_ids
    assert composed == apart


def test_words_of_sentencepiece(tmp_path: Path) -> None:
    """Its own library cuts texts as the tokenizer that is made of a file's words and scores."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text((TINY / "README.md").read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "sp.model"))
    words = [theirs.id_to_piece(number) for number in range(len(theirs))]
    control, byte, unknown = 3, 6, 2
    kinds = {word: byte for word in words if word.startswith("<0x")}
    kinds |= {"<s>": control, "</s>": control, "<unk>": unknown}
    scores = [theirs.get_score(number) for number in range(len(theirs))]
    file = vocabulary(
        tmp_path / "x.gguf", words, kinds, [], "default", model="llama", scores=scores
    )
    folder = present_tokenizer(file, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    for asked in ("What is a model?", "two  spaces \n and €, 漢", "reading the answers of models"):
        ids = ours(asked).input_ids
        assert ids == [theirs.bos_id(), *theirs.encode(asked)]
        assert ours.decode(ids, skip_special_tokens=True) == asked


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("deepseek-llm", ["aB", "'", "s", " c", "1", "2", "3", "4", " ", "漢", "!!", "\n"]),
        ("deepseek-v3", ["aB", "'s", " c", "123", "4", " ", "漢", "!!\n"]),
        ("glm4", ["aB", "'s", " c", "123", "4", " 漢", "!!\n"]),
        ("gpt-4o", ["a", "B's", " c", "123", "4", " 漢", "!!\n"]),
        ("tekken", ["a", "B", "'s", " c", "1", "2", "3", "4", " 漢", "!!\n"]),
        ("kimi-k2", ["a", "B's", " c", "123", "4", " ", "漢", "!!\n"]),
    ],
)
def test_where_a_text_is_cut(pre: str, wanted: list[str], tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "x.gguf", gguf_bytes(), {}, [], pre)
    present_tokenizer(file, tmp_path)
    cutter = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    text = "aB's c1234 漢!!\n"
    assert [text[begin:end] for _, (begin, end) in cutter.pre_tokenize_str(text)] == wanted


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BY_THE_MODELS = {
    "qwen35": [
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
    ],
    "minimax-m2": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ],
    "pixtral": [
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    ],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    ],
}
"""The regular expressions in the tokenizer.json of these models."""
PIECES = [
    *("the", "The", "THE", "model", "don't", "I'LL", "we've", "naïve", "e\u0301", "Straße"),
    *("漢字", "モデル", "모델", "привет", "नमस्ते", "7", "2024", "½"),
    *("x_1", "a/b", "//", "{}", "!!", "…"),
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n", " \n", "🙂", "\u00a0"),
]


def random_text(pieces: int = 40) -> str:
    return "".join(random.choices(PIECES, k=pieces))


def check_alike(ours: Any, theirs: tokenizers.Tokenizer, first: tuple[int, ...] = ()) -> None:
    """Compare both on random texts."""
    for _ in range(50):
        text = random_text()
        wanted = theirs.encode(text).ids
        assert ours(text).input_ids == [*first, *wanted], text
        assert ours.decode(wanted) == theirs.decode(wanted), text


@pytest.mark.parametrize("pre", BY_THE_MODELS)
def test_a_tokenizer_with_the_same_words_and_merges(pre: str, tmp_path: Path) -> None:
    cuts: list[Any] = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in BY_THE_MODELS[pre]
    ]
    if pre == "deepseek-coder":
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    theirs = tokenizers.Tokenizer(BPE(ignore_merges=pre == "pixtral"))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    theirs.decoder = decoders.ByteLevel()
    if pre == "qwen35":
        theirs.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    theirs.train_from_iterator([random_text(400) for _ in range(20)], trainer)
    model = json.loads(theirs.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in model["merges"]]
    assert len(merges) > 100
    file = vocabulary(tmp_path / "x.gguf", words, {"<|end|>": 3}, merges, pre)
    folder = present_tokenizer(file, tmp_path)
    check_alike(transformers.AutoTokenizer.from_pretrained(folder), theirs)


def test_words_of_gemma(tmp_path: Path) -> None:
    """Spaces are written as SentencePiece does, and the file has the merges."""
    control = ["<pad>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=control, limit_alphabet=40
    )
    trained.train_from_iterator([random_text(400) for _ in range(20)], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    assert len(merges) > 100
    theirs = tokenizers.Tokenizer(
        BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    theirs.normalizer = normalizers.Replace(" ", "\u2581")
    theirs.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = {"<pad>": 3, "<s>": 3, "<unk>": 3} | dict.fromkeys(control[3:], 6)
    file = vocabulary(
        tmp_path / "x.gguf", words, kinds, [" ".join(one) for one in merges], "", model="gemma4"
    )
    folder = present_tokenizer(file, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    check_alike(ours, theirs, (words.index("<s>"),))


def gguf_bytes() -> list[str]:
    """The words of single bytes, as byte-level tokenizers write them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def vocabulary(
    path: Path,
    words: list[str],
    kinds: dict[str, int],
    merges: list[str],
    pre: str,
    *,
    model: str = "gpt2",
    scores: list[float] | None = None,
) -> Path:
    """A file with a tokenizer and nothing else."""
    file = gguf.GGUFWriter(path, "qwen3moe")
    file.add_tokenizer_model(model)
    if scores is not None:
        file.add_token_scores(scores)
    if model != "gpt2":
        file.add_bos_token_id(words.index("<s>"))
        file.add_unk_token_id(words.index("<unk>"))
    file.add_tokenizer_pre(pre)
    file.add_token_list(words)
    file.add_token_types([kinds.get(word, 1) for word in words])
    file.add_token_merges(merges)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    file.close()
    return path


def present_tokenizer(file: Path, folder: Path) -> Path:
    write_tokenizer(open_gguf(file, vocabulary=True), folder, 100)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre": "poro"}, "field 'tokenizer.ggml.pre' is 'poro': known are qwen2, "),
        ({"words": ["a", "b", "a"]}, "field 'tokenizer.ggml.tokens' is 'a': the word is there tw"),
        ({"merges": ["a c"]}, "field 'tokenizer.ggml.merges' is 'a c': two words that make a th"),
        ({"merges": ["ab"]}, "field 'tokenizer.ggml.merges' is 'ab': two words that make a th"),
    ],
)
def test_a_tokenizer_that_is_not_known(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"words": ["a", "b", "ab"], "kinds": {}, "merges": [], "pre": "qwen2"}
    file = vocabulary(tmp_path / "x.gguf", **(given | change))
    found = refusal(lambda: present_tokenizer(file, tmp_path), file)
    assert found.startswith(said)
    assert found.endswith("; --tokenizer DIR takes another tokenizer")


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    plain = make("qwen3_moe", tmp_path / "plain", 7, **SIZES)
    file = write(plain, tmp_path / "model.gguf", q8_0)
    said = refusal(lambda: present(file, tokenizer=True), file)
    assert said == "has no tokenizer: --tokenizer DIR gives one"
    assert not list(cache().glob("*"))
