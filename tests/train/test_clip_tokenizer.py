"""CLIP's tokenizer against the published one: the `SimpleTokenizer` of open_clip's wheel, with ftfy and regex."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import ftfy
import instant_clip_tokenizer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.clip_vocabulary import clip_vocabulary
from train.tokenizer import ClipTokenizer, clean_as_clip

PEER = Path(sys.prefix) / "open-clip" / "open_clip"
CONTEXT = 77
WORDS = [
    *("a photo of a CAT", "Grinning face", "don't", "we'll've", "it'S", "O'Neill", "100", "2026", "x86", "C++"),
    *("&amp;", "&amp;amp;", "&lt;br&gt;", "<br>", "&eacute;", "&#39;", "&#x1F600;", "&nbsp;", "&copy", "AT&T"),
    *("😀", "👨‍👩‍👧", "🏳️‍🌈", "👍🏽", "1️⃣", "🇪🇺", "(╯°□°)╯", "™", "№5", "½"),
    *("Ã©", "â€™", "â€œquotedâ€", "ï»¿", "schÃ¶n", "“”", "‘s", "—", "…", "ﬁﬀ", "ＡＢ１"),
    *("日本語", "한국어", "العربية", "हिन्दी", "ไทย", "Straße", "ẞ", "İstanbul", "ΟΔΟΣ", "ñ", "n\u0303", "a\u0345b"),
    *("\u200b", "\ufeff", "\u00ad", "\x00", "\x1b[31m", "\x7f", "\u2028", "\x85", "\u3000", "\r\n", "\t", " ", "  "),
    *(
        "<start_of_text>",
        "<end_of_text>",
        "<|endoftext|>",
        "!!!",
        "...",
        "#tag",
        "@name",
        "file_name.jpg",
        "http://a.b/c?d=e",
    ),
]
# Letters that one side knows and the other does not are left out: the draw knows Unicode 14 (Python 3.11) or 15.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\u017f")
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(CHARACTERS, max_size=5), st.just(" ")), max_size=20)


@pytest.fixture(scope="module")
def published() -> Any:
    """The `SimpleTokenizer` of open_clip's `tokenizer.py`, which is loaded alone: its package wants torchvision."""
    if not PEER.is_dir():
        pytest.fail(f"{PEER}: no open_clip here; `make install-dev` puts it there")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", PEER / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    """Ours, built once."""
    return ClipTokenizer()


@settings(deadline=None, max_examples=400)
@given(parts=TEXTS)
@example(parts=[" ".join(WORDS)])
@example(parts=["word " * 100])
def test_ids_are_those_of_the_published_tokenizer(published: Any, ours: ClipTokenizer, parts: list[str]) -> None:
    """Any text: Unicode, emoji, HTML, broken encodings; a long one is cut with its end kept."""
    text = "".join(parts)
    expected = published([text], CONTEXT)[0].tolist()
    ids = ours.encode(text, CONTEXT)
    assert ids + [0] * (CONTEXT - len(ids)) == expected


@pytest.mark.parametrize("word", ["<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>"])
def test_special_token_in_a_caption_is_what_the_published_one_makes_of_it(
    published: Any, ours: ClipTokenizer, word: str
) -> None:
    """Two are the tokens, two are text."""
    text = f"a {word} cat"
    ids = ours.encode(text, CONTEXT)
    assert ids == published([text], CONTEXT)[0].tolist()[: len(ids)]
    assert bool(set(ids[1:-1]) & {49406, 49407}) == word.endswith("_of_text>")


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(max_codepoint=126), max_size=40))
def test_plain_text_needs_no_mending(text: str) -> None:
    """The short way of plain ASCII gives what the long way gives."""
    if text.isprintable() and "&" not in text:
        assert clean_as_clip(text) == " ".join(ftfy.fix_text(text).lower().split())


def test_vocabulary_is_the_published_one() -> None:
    """Every token and merge, from decoding alone."""
    merges = gzip.decompress((PEER / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    expected = [tuple(line.split()) for line in merges[1 : 49152 - 256 - 2 + 1]]
    tokens, found = clip_vocabulary(instant_clip_tokenizer.Tokenizer().decode, 49406)
    assert found == expected
    assert tokens[512:] == ["".join(pair) for pair in expected]
    assert tokens[:2] == ["!", '"']
    assert len(tokens) == 49406
