"""Text to token ids: a byte-pair vocabulary trained on the corpus, or CLIP's own.

In both, id 0 pads, a text ends with the end-of-text token, that token is the largest id there is (which is
how the text tower finds it), and a text that is too long is cut so that the end token stays.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import ftfy
import torch
from pydantic import Field
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokenization
from torch import Tensor

from infra.config import Config
from infra.errors import RunError, UserError
from infra.storage import Folder

START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"
TOKENIZER_NAME = "tokenizer.json"
WORD = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]"
"""A run of letters, a digit, or another sign, with the space before it."""


class TokenizerConfig(Config):
    """Which vocabulary texts are cut into."""

    kind: Literal["corpus", "clip"] = Field(
        default="corpus", description="a vocabulary trained on the corpus, or CLIP's own"
    )
    vocabulary: int = Field(default=4096, ge=300, description="largest vocabulary trained on the corpus, tokens")


class Tokenizer(Protocol):
    """What the trainer and the evaluation ask of a tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Token ids lie in `[0, vocabulary)`."""
        ...

    def encode(self, text: str, context: int) -> list[int]:
        """Return at most `context` token ids, the last one the end-of-text token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the cleaned text of token ids."""
        ...

    def save(self, folder: Folder) -> None:
        """Write what `load_tokenizer` needs."""
        ...


def clean(text: str) -> str:
    """Undo HTML escapes (twice, as web captions have them) and collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def clean_as_clip(text: str) -> str:
    """Clean a text as OpenAI's tokenizer does: mend broken encodings, undo HTML escapes, collapse white space, lower.

    U+0345, a mark that OpenAI's pattern takes for a letter in one place and for none in another, parts words.
    """
    if not (text.isascii() and text.isprintable()) or "&" in text:  # elsewhere nothing is broken, which is quick to see
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.lower().replace("\u0345", " ").split())


def pad(rows: Sequence[Sequence[int]], length: int = 0) -> Tensor:
    """Return token ids `[B, L]` padded with 0 to the longest row, or to `length` tokens."""
    length = length or max(map(len, rows), default=1)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.int64)


class CorpusTokenizer:
    """A byte-level, lower-case byte-pair vocabulary (Sennrich et al. 2016): no text is without tokens."""

    def __init__(self, tokenization: Tokenization) -> None:
        # A caption that spells a special token out is a caption like any other.
        tokenization.encode_special_tokens = True
        self._tokenization = tokenization
        self._start, self._end = (tokenization.get_vocab()[token] for token in (START, END))

    @classmethod
    def from_json(cls, text: str) -> CorpusTokenizer:
        """Return the tokenizer whose `to_json` it is."""
        return cls(Tokenization.from_str(text))

    def __reduce__(self) -> tuple[Callable[[str], CorpusTokenizer], tuple[str]]:
        return CorpusTokenizer.from_json, (self.to_json(),)  # how it takes special tokens is not part of its JSON

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> CorpusTokenizer:
        """Learn merges from texts; the same texts in any order give the same vocabulary."""
        tokenization = Tokenization(models.BPE())
        tokenization.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORD), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
        tokenization.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        tokenization.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - 2,
            min_frequency=2,
            special_tokens=[PADDING],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenization.train_from_iterator(sorted(map(clean, texts)), trainer)
        tokenization.add_special_tokens([START, END])
        return cls(tokenization)

    @property
    def vocabulary(self) -> int:
        """Token ids lie in `[0, vocabulary)`."""
        return int(self._tokenization.get_vocab_size())

    def encode(self, text: str, context: int) -> list[int]:
        """Return at most `context` token ids, the last one the end-of-text token."""
        ids = self._tokenization.encode(clean(text), add_special_tokens=False).ids
        return [self._start, *ids[: context - 2], self._end]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the cleaned, lower-case text of token ids."""
        return clean(self._tokenization.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> str:
        """Return the vocabulary in the format of Hugging Face tokenizers."""
        return str(self._tokenization.to_str(pretty=True))

    def save(self, folder: Folder) -> None:
        """Write `tokenizer.json` in the format of Hugging Face tokenizers."""
        folder.write(TOKENIZER_NAME, self.to_json().encode())


class ClipTokenizer:
    """CLIP's 49,408 tokens, through instant-clip-tokenizer.

    Ids are those of OpenAI's tokenizer, but for letters newer than Unicode 15, which part words there or here as
    either knows them for letters, and for a long s (U+017F) after an apostrophe; and for special tokens spelt out in
    a text, which are taken as open_clip's tokenizer takes them: `<start_of_text>` and `<end_of_text>` are the tokens,
    `<|startoftext|>` and `<|endoftext|>` are text.
    """

    def __init__(self) -> None:
        import instant_clip_tokenizer

        self._tokenizer = instant_clip_tokenizer.Tokenizer()
        self.vocabulary = 49408

    def encode(self, text: str, context: int) -> list[int]:
        """Return at most `context` token ids, the last one the end-of-text token."""
        ids = self._tokenizer.encode(clean_as_clip(text))
        return [49406, *ids[: context - 2], 49407]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the cleaned, lower-case text of token ids."""
        return clean(self.decode_raw([token for token in ids if 0 < token < 49406]))

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Return the text of token ids as it comes, a space after each word, its special tokens too."""
        return str(self._tokenizer.decode(list(ids)))

    def save(self, folder: Folder) -> None:
        """Write a `tokenizer.json` that names the vocabulary."""
        folder.write_json(TOKENIZER_NAME, {"kind": "clip"})


def create_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Build the tokenizer of a new run; `texts` are the corpus' captions."""
    if config.kind == "clip":
        return ClipTokenizer()
    return CorpusTokenizer.train(texts, config.vocabulary)


def load_tokenizer(folder: Folder) -> Tokenizer:
    """Load the tokenizer of a run folder.

    Raises:
        UserError: it has none.
        RunError: its file is damaged.
    """
    if not folder.exists(TOKENIZER_NAME):
        raise UserError(f"{folder.path(TOKENIZER_NAME)}: no such file; give the folder of a run of `pairmill train`")
    found = folder.read_json(TOKENIZER_NAME)
    if isinstance(found, dict) and found.get("kind") == "clip":
        return ClipTokenizer()
    try:
        return CorpusTokenizer.from_json(folder.read(TOKENIZER_NAME).decode())
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower one, whatever is wrong with the file
        reason = f"no token {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RunError(
            f"{folder.path(TOKENIZER_NAME)}: no vocabulary of a run ({reason}); bring back the run's own file"
        ) from None
