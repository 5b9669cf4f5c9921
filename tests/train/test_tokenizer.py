"""Both vocabularies: round trips, truncation, determinism."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenization
from tokenizers import models

from infra.errors import RunError, UserError
from infra.storage import Folder
from train.tokenizer import (
    END,
    PADDING,
    START,
    ClipTokenizer,
    CorpusTokenizer,
    Tokenizer,
    TokenizerConfig,
    clean,
    create_tokenizer,
    load_tokenizer,
    pad,
)

TEXTS = [
    "Grinning face emoji",
    "grinning face: face, grin",
    "red apple - fruit, red",
    "a cat &amp; a dog",
] * 3
LONG = "grinning face with tears of joy, laughing, and a very long tail of further words " * 4


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    """One of each kind."""
    return [CorpusTokenizer.train(TEXTS, 400), ClipTokenizer()]


def test_round_trip(tokenizers: list[Tokenizer]) -> None:
    """Decoding gives the cleaned, lower-case text back."""
    for tokenizer in tokenizers:
        for text in ("grinning face", "red  apple", "a cat &amp; a dog"):
            ids = tokenizer.encode(text, 77)
            assert tokenizer.decode(ids).replace(" ", "") == clean(text).lower().replace(" ", "")


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60), context=st.integers(3, 40))
def test_end_token_is_the_largest_and_the_last(tokenizers: list[Tokenizer], text: str, context: int) -> None:
    """Any text, cut or not, ends with the end token, which no other position holds, and ids are in range."""
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text, context)
        assert 2 <= len(ids) <= context
        assert ids[-1] == tokenizer.vocabulary - 1
        assert max(ids[:-1]) < ids[-1]
        assert min(ids) >= 0


@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from([START, END, PADDING, "red", " ", END.upper()]), max_size=6))
def test_special_token_in_a_caption_is_text(words: list[str]) -> None:
    """Spelt out, in the process that trained the vocabulary and in one it was sent to."""
    trained = CorpusTokenizer.train([*TEXTS, f"a {END} that someone typed"], 400)
    text = "".join(words)
    for tokenizer in (trained, pickle.loads(pickle.dumps(trained))):  # noqa: S301 - our own
        ids = tokenizer.encode(text, 200)
        assert not {0, trained.encode("", 3)[0], ids[-1]} & set(ids[1:-1])
        assert tokenizer.decode(ids).replace(" ", "") == clean(text).lower().replace(" ", "")


def test_long_text_is_cut_with_its_end_kept(tokenizers: list[Tokenizer]) -> None:
    """The first tokens stay."""
    for tokenizer in tokenizers:
        whole, cut = tokenizer.encode(LONG, 1000), tokenizer.encode(LONG, 12)
        assert len(cut) == 12
        assert cut[:-1] == whole[:11]
        assert cut[-1] == whole[-1]


def test_clip_ids_are_the_published_ones() -> None:
    """The ids of OpenAI's tokenizer for its own example, `a diagram`."""
    assert ClipTokenizer().encode("a diagram", 77) == [49406, 320, 22697, 49407]


def test_vocabulary_does_not_depend_on_the_order_of_texts(tmp_path: Path) -> None:
    """Byte for byte the same file."""
    for name, texts in (("one", TEXTS), ("two", TEXTS[::-1])):
        create_tokenizer(TokenizerConfig(vocabulary=350), texts).save(Folder(tmp_path / name))
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("kind", ["corpus", "clip"])
def test_saved_tokenizer_loads_as_it_was(tmp_path: Path, kind: str) -> None:
    """Same ids after saving."""
    tokenizer = create_tokenizer(TokenizerConfig.model_validate({"kind": kind}), TEXTS)
    tokenizer.save(Folder(tmp_path))
    assert load_tokenizer(Folder(tmp_path)).encode(LONG, 30) == tokenizer.encode(LONG, 30)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """A folder that is no run."""
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        load_tokenizer(Folder(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", '{"kind": "other"}', "words"])
def test_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    """JSON of something else, or none."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RunError, match=r"tokenizer.json: no") as caught:
        load_tokenizer(Folder(tmp_path))
    assert "\n" not in str(caught.value)


def test_tokenizer_without_the_ends_is_named(tmp_path: Path) -> None:
    """A vocabulary of somebody else's."""
    (tmp_path / "tokenizer.json").write_text(Tokenization(models.BPE()).to_str())
    with pytest.raises(RunError, match=r"tokenizer.json: no vocabulary of a run \(no token '<\|startoftext\|>'\)"):
        load_tokenizer(Folder(tmp_path))


def test_pad_fills_with_zero() -> None:
    """To the longest row."""
    assert pad([[1, 9], [1, 2, 9]]).tolist() == [[1, 9, 0], [1, 2, 9]]
