"""The URL lists of the sample web: (URL, caption) rows as a crawl would have found them.

`urls.parquet` is what a pipeline reads. `expected.parquet` says, row by row in the same order, what each row
is and what should become of it; no pipeline reads it, tests compare with it.

Every picture of the split `train` has exactly one row of its own: a good one, or one of the misbehaviours
that end well. All other rows are extra: misbehaviours that end badly, useless captions, and duplicates. No
row shows a picture of a hold-out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Folder
from pairmill.sample_web import archive, captions, misbehaviour, pictures
from pairmill.sample_web.archive import Picture
from pairmill.sample_web.misbehaviour import FILTERED, SUCCESS

GOOD = "good"
SAME_BYTES = "same_bytes"
RESIZED = "resized"
DUPLICATE_URL = "duplicate_url"
DUPLICATES = {SAME_BYTES: 240, RESIZED: 240, DUPLICATE_URL: 24}

BadCaption = Callable[[random.Random], str]
BAD_CAPTIONS: dict[str, tuple[int, BadCaption]] = {
    "caption_empty": (60, lambda draw: draw.choice(captions.EMPTY)),
    "caption_too_short": (40, lambda draw: draw.choice(captions.TOO_SHORT)),
    "caption_file_name": (60, captions.file_name_caption),
    "caption_boilerplate": (60, lambda draw: draw.choice(captions.BOILERPLATE)),
}


@dataclass(frozen=True)
class Row:
    """One row of the list, and what should become of it.

    `expected_status` and `expected_reason` are what ingest, or the plan, should say; None where several
    answers are right. `duplicate_of` is, for a duplicate, the URL of the row that shows the same picture.
    """

    url: str
    caption: str
    family: str
    license: str
    kind: str
    key: str
    expected_status: str | None
    expected_reason: str | None
    duplicate_of: str | None = None


@dataclass(frozen=True)
class RowsManifest:
    """What `write_rows` wrote. `pictures` is how many different pictures the rows that end well show."""

    urls: Path
    expected: Path
    rows: int
    pictures: int
    by_kind: dict[str, int]


URL_COLUMNS = ("url", "caption", "family", "license")
SCHEMA = pa.schema([(name, pa.string()) for name in Row.__dataclass_fields__])


def write_rows(
    folder: Path | str,
    base_urls: Sequence[str],
    *,
    seed: int = 0,
    share: float = 1.0,
    limit: int | None = None,
    kinds: Sequence[str] | None = None,
) -> RowsManifest:
    """Writes `urls.parquet` and `expected.parquet` into `folder`, the same for the same arguments.

    `base_urls` are the hosts over which rows are spread. `share` multiplies how many misbehaving, duplicate
    and badly captioned rows there are (0: none, else at least one a kind). `limit` takes only so many of the
    training pictures. `kinds` keeps only these kinds beside the good rows.

    Raises ValueError for no hosts or an unknown kind.
    """
    rows = make_rows(base_urls, seed=seed, share=share, limit=limit, kinds=kinds)
    folder = Path(folder)
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    manifest = RowsManifest(
        urls=folder / "urls.parquet",
        expected=folder / "expected.parquet",
        rows=len(rows),
        pictures=len({row.key for row in rows if row.expected_status == SUCCESS}),
        by_kind=dict(sorted(Counter(row.kind for row in rows).items())),
    )
    expectations = table.drop_columns([name for name in URL_COLUMNS if name != "url"])
    for path, rows_of_it in ((manifest.expected, expectations), (manifest.urls, table.select(URL_COLUMNS))):
        with Folder(folder).create(path.name) as stream:
            pq.write_table(rows_of_it, stream)
    return manifest


def make_rows(
    base_urls: Sequence[str],
    *,
    seed: int = 0,
    share: float = 1.0,
    limit: int | None = None,
    kinds: Sequence[str] | None = None,
) -> list[Row]:
    """The rows that `write_rows` writes, in their order; the arguments are the same."""
    if not base_urls:
        raise ValueError("base_urls is empty; give at least one URL of a running sample web")
    known = {GOOD, *misbehaviour.BY_KIND, *DUPLICATES, *BAD_CAPTIONS}
    unknown = sorted(set(kinds or ()) - known)
    if unknown:
        raise ValueError(f"unknown kinds of rows: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    shuffled = list(archive.select("train"))
    random.Random(f"pictures/{seed}").shuffle(shuffled)
    maker = _Maker(tuple(url.rstrip("/") for url in base_urls), seed, shuffled[:limit])
    rows = list(maker.rows(share, known if kinds is None else set(kinds)))
    random.Random(f"order/{seed}").shuffle(rows)
    return rows


class _Maker:
    """Makes rows of every kind from the training pictures, which come shuffled."""

    def __init__(self, base_urls: Sequence[str], seed: int, chosen: Sequence[Picture]) -> None:
        self.base_urls = base_urls
        self.seed = seed
        self.pictures = chosen
        self.draw = random.Random(f"rows/{seed}")

    def rows(self, share: float, kinds: set[str]) -> Iterator[Row]:
        waiting = iter(self.pictures)
        for item in misbehaviour.CATALOGUE:
            if item.kind in kinds:
                # What ends well is the picture's own row; what fails is a row more.
                count = _count(item.rows, share)
                source = waiting if item.succeeds else iter(self._sample(count))
                for _, picture in zip(range(count), source, strict=False):
                    yield self._misbehaving(item, picture)
        plain = list(waiting)
        yield from map(self._good, plain)
        for kind, (full, make) in BAD_CAPTIONS.items():
            if kind in kinds:
                for picture in self._sample(_count(full, share)):
                    yield self._badly_captioned(kind, picture, make(self.draw))
        for kind, full in DUPLICATES.items():
            if kind in kinds:
                for picture in self._sample(_count(full, share), plain):
                    yield self._duplicate(kind, picture)

    def _sample(self, count: int, pool: Sequence[Picture] | None = None) -> list[Picture]:
        pool = self.pictures if pool is None else pool
        return self.draw.sample(pool, min(count, len(pool)))

    def _host(self, label: str) -> str:
        return random.Random(f"host/{self.seed}/{label}").choice(self.base_urls)

    def _good_url(self, picture: Picture) -> str:
        return self._host(picture.key) + pictures.good_path(picture.key)

    def _caption(self, picture: Picture, variant: int = 0) -> str:
        return captions.caption(picture, seed=self.seed, variant=variant)

    def _good(self, picture: Picture) -> Row:
        return _row(picture, self._good_url(picture), self._caption(picture), GOOD, SUCCESS, "")

    def _misbehaving(self, item: misbehaviour.Misbehaviour, picture: Picture) -> Row:
        url = misbehaviour.url(item.kind, picture.key, self._host(f"{item.kind}/{picture.key}"))
        return _row(picture, url, self._caption(picture), item.kind, item.status, item.reason)

    def _badly_captioned(self, kind: str, picture: Picture, caption: str) -> Row:
        url = self._host(f"{kind}/{picture.key}") + pictures.copy_path(picture.key, 9)
        return _row(picture, f"{url}?page={kind}", caption, kind, FILTERED, kind)

    def _duplicate(self, kind: str, picture: Picture) -> Row:
        original = self._good_url(picture)
        if kind == DUPLICATE_URL:
            return _row(picture, original, self._caption(picture), kind, FILTERED, DUPLICATE_URL, original)
        host = self._host(f"{kind}/{picture.key}")
        if kind == SAME_BYTES:
            path = pictures.copy_path(picture.key, self.draw.randint(1, 3))
        else:
            path = pictures.variant_path(picture.key, self.draw.choice(sorted(pictures.VARIANTS)))
        caption = self._caption(picture, variant=self.draw.randint(0, 1))
        return _row(picture, host + path, caption, kind, SUCCESS, "", original)


def _count(full: int, share: float) -> int:
    return max(1, round(full * share)) if share > 0 else 0


def _row(
    picture: Picture,
    url: str,
    caption: str,
    kind: str,
    status: str | None,
    reason: str | None,
    duplicate_of: str | None = None,
) -> Row:
    return Row(url, caption, picture.family, picture.license, kind, picture.key, status, reason, duplicate_of)
