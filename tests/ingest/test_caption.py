"""Which captions are dropped, and under which name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.caption import caption_reason
from ingest.config import CaptionConfig
from pairmill.sample_web import archive, captions
from shards.layout import Reason

DEFAULT = CaptionConfig()


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, Reason.CAPTION_EMPTY),
        ("", Reason.CAPTION_EMPTY),
        (" \n\t ", Reason.CAPTION_EMPTY),
        ("cat", Reason.CAPTION_TOO_SHORT),
        ("word " * 300, Reason.CAPTION_TOO_LONG),
        ("IMG_1234.jpg", Reason.CAPTION_FILE_NAME),
        ("DSC00012.JPG", Reason.CAPTION_FILE_NAME),
        ("IMG_20190304_123456", Reason.CAPTION_FILE_NAME),
        ("image003", Reason.CAPTION_FILE_NAME),
        ("my holiday photo.jpeg", Reason.CAPTION_FILE_NAME),
        ("d41d8cd98f00b204e9800998ecf8427e", Reason.CAPTION_FILE_NAME),
        ("Screenshot 2021-03-04 12.30.11", Reason.CAPTION_FILE_NAME),
        ("click to enlarge", Reason.CAPTION_BOILERPLATE),
        ("No image available", Reason.CAPTION_BOILERPLATE),
        ("[thumbnail]", Reason.CAPTION_BOILERPLATE),
        ("© 2020 Example Ltd", Reason.CAPTION_BOILERPLATE),
        ("!!! --- !!!", Reason.CAPTION_BOILERPLATE),
        ("a cat on a mat", Reason.NONE),
        ("photo of a red car", Reason.NONE),
        ("Image processing pipeline", Reason.NONE),
        ("猫が寝ている写真", Reason.NONE),
        ("iPhone 12", Reason.NONE),
        ("logo of the Olympic games", Reason.NONE),
    ],
)
def test_captions(caption: str | None, reason: Reason) -> None:
    assert caption_reason(caption, DEFAULT) == reason


def test_every_filter_can_be_switched_off() -> None:
    off = CaptionConfig(min_characters=0, max_characters=10**6, file_names=False, boilerplate=False)
    for caption in (None, "", "a", "IMG_1234.jpg", "click to enlarge", "word " * 1000):
        assert caption_reason(caption, off) == Reason.NONE


def test_no_caption_of_a_real_picture_is_dropped() -> None:
    for picture in archive.select("train"):
        for variant in (0, 1):
            caption = captions.caption(picture, seed=0, variant=variant)
            assert caption_reason(caption, DEFAULT) == Reason.NONE, caption


@given(st.text(max_size=2000))
def test_any_text_gets_an_answer_quickly(caption: str) -> None:
    assert isinstance(caption_reason(caption, DEFAULT), Reason)
