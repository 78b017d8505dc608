"""The tokenizer of a GGUF file, as the files that transformers reads.

The file has the words and their kinds. For byte-level BPE (`gpt2`) it has the merges, and it only
names how a text is cut before them (`tokenizer.ggml.pre`); `CUTS` says what the names mean. For
SentencePiece (`llama`) it has a score of each word, of which the merges are made, and for Gemma's
kind of it (`gemma4`) the merges. The vocabulary of a model is a list in which a word's place is its
id.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from lvllm.checkpoint.gguf_headers import GgufHeader
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["has_tokenizer", "write_tokenizer"]

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4
"""Kinds of words that are found in a text before it is cut. Control words are not shown."""
BYTE_LEVEL, SENTENCES, MERGED_SENTENCES = "gpt2", "llama", "gemma4"
"""What `tokenizer.ggml.model` calls the kinds of tokenizers that are read."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Cut:
    """How a text becomes pieces, within which words are merged."""

    patterns: tuple[str, ...]
    """Regular expressions, one after the other: each match, and what lies between, is a piece."""
    composed: bool = False
    """Whether the text is brought into Unicode's form C before."""
    whole_words: bool = False
    """Whether a piece that is a word is taken as it is, whatever the merges say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _by_case(but: str = "", after: str = f"{_CONTRACTIONS}?") -> str:
    """Words that end before a capital letter, of letters other than those of `but`."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{after}|{before}{upper}+{lower}*{after}"


GPT2 = Cut(
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
)
GPT4 = Cut((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",))
LLAMA3 = Cut(GPT4.patterns, whole_words=True)
_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
GPT4O = Cut((rf"{_by_case()}|\p{{N}}{{1,3}}|{_SLASHES}",))
_NOT_HAN = r"&&[^\p{Han}]"
# Chinese, Japanese and Korean signs as DeepSeek's tokenizers have them.
_SIGNS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CUTS: dict[str, Cut] = {
    "qwen2": Cut((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), composed=True),
    "qwen35": Cut(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
        composed=True,
    ),
    "llama-bpe": LLAMA3,
    "pixtral": LLAMA3,
    "dbrx": GPT4,
    "glm4": GPT4,
    "gpt-4o": GPT4O,
    "minimax-m2": GPT4O,
    "tekken": Cut((rf"{_by_case(after='')}|\p{{N}}|{_SLASHES}",), whole_words=True),
    "kimi-k2": Cut((rf"\p{{Han}}+|{_by_case(_NOT_HAN)}|\p{{N}}{{1,3}}|{_REST}",)),
    "deepseek-llm": Cut(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1d400}-\x{1d7ff}]]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _SIGNS,
            r"\p{N}",
        )
    ),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _SIGNS, r"\p{N}")),
    "deepseek-v3": Cut(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "gpt-2": GPT2,
    "olmo": GPT2,
}


def has_tokenizer(header: GgufHeader) -> bool:
    return f"{PREFIX}model" in header.fields


def write_tokenizer(header: GgufHeader, folder: Path, longest: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template, into `folder`.

    Args:
        header: read with the vocabulary.
        folder: an existing folder.
        longest: the context of the model, in tokens.

    Raises:
        CheckpointError: for a tokenizer that is damaged or of an unknown kind.
    """
    fields = _Vocabulary(header)
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "pad"):
        number = fields.token_id("padding" if name == "pad" else name)
        if number is not None:
            config[f"{name}_token"] = fields.words[number]
    template = header.fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class _Vocabulary:
    """The tokenizer's fields, checked."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.kind = self._text("model")
        if self.kind not in (BYTE_LEVEL, SENTENCES, MERGED_SENTENCES):
            raise self.refuse(
                "model",
                self.kind,
                f"{BYTE_LEVEL} (byte-level BPE), {SENTENCES} (SentencePiece) or {MERGED_SENTENCES}"
                " is wanted",
            )
        self.words = self._texts("tokens")
        self.ids = {word: number for number, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            twice = next(w for number, w in enumerate(self.words) if self.ids[w] != number)
            raise self.refuse("tokens", twice, "the word is there twice")
        self.kinds = self._fields.get(f"{PREFIX}token_type", [1] * len(self.words))
        if not isinstance(self.kinds, Sequence) or len(self.kinds) != len(self.words):
            raise self.refuse("token_type", "a list", f"{len(self.words)} numbers are wanted")

    @property
    def cut(self) -> Cut:
        name = self._text("pre")
        if name not in CUTS:
            raise self.refuse("pre", name, f"known are {', '.join(CUTS)}")
        return CUTS[name]

    @property
    def merges(self) -> list[tuple[str, str]]:
        return [self._merge(text) for text in self._texts("merges", [])]

    @property
    def scores(self) -> dict[str, float]:
        """The score of each word."""
        found = self._fields.get(f"{PREFIX}scores")
        if not isinstance(found, list) or len(found) != len(self.words):
            raise self.refuse("scores", "no list", f"{len(self.words)} numbers are wanted")
        return dict(zip(self.words, found, strict=True))

    @property
    def found_first(self) -> list[AddedToken]:
        """The words that are found in a text before it is cut."""
        return [
            AddedToken(word, special=kind == CONTROL, normalized=False)
            for word, kind in zip(self.words, self.kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]

    @property
    def _fields(self) -> Mapping[str, Any]:
        return self._header.fields

    def flag(self, key: str, default: bool = False) -> bool:
        return self._fields.get(PREFIX + key, default) is True

    def token_id(self, name: str) -> int | None:
        """The id of a special word. None: the tokenizer has no such word."""
        value = self._fields.get(f"{PREFIX}{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.words):
            raise self.refuse(
                f"{name}_token_id", value, f"the id of one of {len(self.words)} words is wanted"
            )
        return value

    def refuse(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self._header.file}: field {quoted(PREFIX + key)} is {quoted(value)}: {wanted};"
            " --tokenizer DIR takes another tokenizer"
        )

    def _text(self, key: str) -> str:
        value = self._fields.get(PREFIX + key)
        if not isinstance(value, str):
            raise self.refuse(key, value, "a name is wanted")
        return value

    def _texts(self, key: str, default: Sequence[str] | None = None) -> Sequence[str]:
        value = self._fields.get(PREFIX + key, default)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.refuse(key, value and "no list of words", "a list of words is wanted")
        return value

    def _merge(self, text: str) -> tuple[str, str]:
        left, space, right = text.partition(" ")
        if not space or any(word not in self.ids for word in (left, right, left + right)):
            raise self.refuse("merges", text, "two words that make a third are wanted")
        return left, right


def _tokenizer(of: _Vocabulary) -> Tokenizer:
    tokenizer = _byte_level(of) if of.kind == BYTE_LEVEL else _sentences(of)
    tokenizer.add_tokens(of.found_first)
    first = of.token_id("bos")
    if of.flag("add_bos_token", of.kind != BYTE_LEVEL) and first is not None:
        word = of.words[first]
        tokenizer.post_processor = TemplateProcessing(
            single=[word, "$A"], pair=[word, "$A", word, "$B"], special_tokens=[(word, first)]
        )
    return tokenizer


def _byte_level(of: _Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(BPE(dict(of.ids), of.merges, ignore_merges=of.cut.whole_words))
    if of.cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in of.cut.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentences(of: _Vocabulary) -> Tokenizer:
    if of.kind == SENTENCES:
        # transformers takes a second to import, which only such files are to pay for.
        from transformers.convert_slow_tokenizer import generate_merges

        merges = generate_merges(of.ids, of.scores, [token.content for token in of.found_first])
    else:
        merges = of.merges
    unknown = of.token_id("unknown")
    tokenizer = Tokenizer(
        BPE(
            dict(of.ids),
            merges,
            unk_token=None if unknown is None else of.words[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = of.flag("add_space_prefix", of.kind == SENTENCES)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    shown: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        spaces.insert(0, normalizers.Prepend(SPACE))
        shown.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(shown)
    return tokenizer
