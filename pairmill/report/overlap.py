"""What the corpus had in common with test sets, as its dedup found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pairmill.report.wording import ADDRESS_CHARACTERS, plain


@dataclass(frozen=True)
class KnownSet:
    """A test set: its pictures, those with a copy in the corpus, and the samples that went for it."""

    name: str
    pictures: int
    with_copy: int
    share: float  # with a copy, of the pictures that can be decoded
    samples: int
    by_hash: int
    by_embedding: int


def test_sets(totals: Mapping[str, Any]) -> list[KnownSet]:
    """Return those of dedup's totals; none if it was not asked."""
    return [
        KnownSet(
            plain(one["suite"], ADDRESS_CHARACTERS),
            int(one["pictures"]),
            int(one["with_copy"]),
            int(one["with_copy"]) / max(1, int(one["pictures"]) - int(one["broken"])),
            int(one["samples"]),
            int(one["samples_by_hash"]),
            int(one["samples_by_embedding"]),
        )
        for one in totals.get("test_sets", ())
    ]
