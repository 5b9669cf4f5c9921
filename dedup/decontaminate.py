"""Samples that show a picture that models are measured on: by equal bodies and PDQ hashes, and by embeddings.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 5, find the
overlap of their corpus with each test set by a detector of near-duplicates, and measure what it does to the accuracy.
Here such samples go: first, before it is chosen who of several duplicates stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dedup.choose import HashGroups, Indices, by_hash
from dedup.config import DedupConfig
from dedup.embeddings import Embeddings, check_one_model, load
from dedup.hamming import distances
from dedup.hamming_between import pairs_between
from dedup.matches import Matches, MatchKeeper
from dedup.same_look import Thumbnails, same
from dedup.signature import Signatures
from dedup.suites import SHA256_BYTES, Framing, Listed, Suites, read_suites
from infra.cluster import ClusterConfig
from infra.errors import UserError
from infra.logs import log

Thumbnailing = Callable[[Indices], Thumbnails]
"""Returns the thumbnails `[n, 64, 64, 3]` of samples `[n]`, which are in order."""

_HASHES_AT_ONCE, _DIGESTS_AT_ONCE, _LOOKS_AT_ONCE, _EMBEDDINGS_AT_ONCE = 1 << 22, 1 << 20, 8192, 4096


@dataclass(frozen=True)
class Contaminated:
    """The `C` samples that show a test picture, by number: which picture, and how close they are."""

    sample: Indices  # [C], rising
    picture: Indices  # [C]
    distance: npt.NDArray[np.int32]  # [C], of the two PDQ hashes, in bits; 0 of equal bodies
    cosine: npt.NDArray[np.float32]  # [C], of the two embeddings; NaN but for those found by them alone


@dataclass(frozen=True)
class Overlap:
    """What a corpus and some suites have in common."""

    suites: Suites
    by_hash: Matches
    by_embedding: Matches
    unhashed: npt.NDArray[np.bool_]  # [F], sound test pictures too flat for a hash that tells anything

    def contaminated(self, signatures: Signatures) -> Contaminated:
        """Return the samples concerned, each with its closest picture: by hash, and only without one by embedding."""
        hashed, near = self.by_hash.closest(), self.by_embedding.closest()
        alone = ~np.isin(near.sample, hashed.sample)
        sample = np.concatenate([hashed.sample, near.sample[alone]])
        picture = np.concatenate([hashed.picture, near.picture[alone]])
        cosine = np.concatenate([np.full(len(hashed.sample), np.nan, np.float32), 1 - near.gap[alone]])
        bits = distances(signatures.phash[near.sample[alone]], self.suites.phash[near.picture[alone]])
        distance = np.concatenate([hashed.gap.astype(np.int32), bits.astype(np.int32)])
        order = np.argsort(sample)
        return Contaminated(sample[order], picture[order], distance[order], cosine[order])

    def by_suite(self, stays: npt.NDArray[np.bool_] | None = None) -> list[dict[str, Any]]:
        """Return of each suite its name and counts (see `docs/format.md`); `stays` `[N]` adds those of what is left."""
        return [self._counts(number, name, stays) for number, name in enumerate(self.suites.names)]

    def _counts(self, number: int, name: str, stays: npt.NDArray[np.bool_] | None) -> dict[str, Any]:
        here = self.suites.suite == number
        hashed, near = (one.sample[one.suite == number] for one in (self.by_hash, self.by_embedding))
        samples = np.union1d(hashed, near)
        left = {} if stays is None else {
            "with_copy_left": int((self.by_hash.has_copy_left | self.by_embedding.has_copy_left)[here].sum()),
            "samples_left": int(stays[samples].sum()),
        }  # fmt: skip
        return {
            "suite": name,
            "pictures": int(here.sum()),
            "broken": int(self.suites.is_broken[here].sum()),
            "unhashed": int(self.unhashed[here].sum()),
            "with_copy": int((self.by_hash.has_copy | self.by_embedding.has_copy)[here].sum()),
            "with_copy_by_hash": int(self.by_hash.has_copy[here].sum()),
            "with_copy_by_embedding": int(self.by_embedding.has_copy[here].sum()),
            "samples": len(samples),
            "samples_by_hash": len(hashed),
            "samples_by_embedding": len(near),
            **left,
        }


def find_overlap(
    listed: Listed,
    signatures: Signatures,
    embeddings: Embeddings | None,
    thumbnails: Thumbnailing,
    framing: Framing,
    config: DedupConfig,
    cluster: ClusterConfig,
    stays: npt.NDArray[np.bool_] | None = None,
) -> Overlap:
    """Compare all samples `[N]` with all test pictures of `listed`, the suites of `config.decontaminate`.

    Args:
        listed: where the test pictures lie.
        signatures: of the samples.
        embeddings: of the same, from `semantic.embeddings`, if they are at hand.
        thumbnails: makes those of samples whose hash is near a test picture's.
        framing: what ingest made of pictures' shapes.
        config: distances and thresholds.
        cluster: how many cores.
        stays: which samples are still in the corpus; by default all.

    Raises:
        UserError: a suite's pictures or its embeddings are not sound; the message names folder and key.
    """
    threads, asked = cluster.cpus or os.cpu_count() or 1, config.decontaminate
    # Before the pictures are hashed: a mistake in their paths should not wait for that.
    of_samples = _of_samples(signatures, embeddings, config) if asked.embeddings else None
    suites = read_suites(listed, framing, threads)
    hashed, near = MatchKeeper(suites, stays), MatchKeeper(suites, stays)
    _match_bodies(suites, signatures, hashed)
    _match_hashes(suites, signatures, hashed, thumbnails, framing, config, threads)
    if of_samples is not None:
        for number in range(len(asked.suites)):
            pictures, of_pictures = _of_suite(suites, number, config)
            _match_embeddings(pictures, of_pictures, of_samples, asked.threshold, near, asked.embeddings[number])
    unhashed = ~suites.is_broken & (suites.quality < config.min_quality)
    found = Overlap(suites, hashed.matches(), near.matches(), unhashed)
    samples = np.union1d(found.by_hash.sample, found.by_embedding.sample)
    log.info("dedup: %d of %d samples show one of %d test pictures", len(samples), len(signatures), len(suites))
    return found


def _match_bodies(suites: Suites, signatures: Signatures, keeper: MatchKeeper) -> None:
    pictures = np.flatnonzero(~suites.is_broken)
    pictures = pictures[np.argsort(suites.sha256[pictures], kind="stable")]
    known = suites.sha256[pictures]
    for start in range(0, len(signatures) if len(known) else 0, _DIGESTS_AT_ONCE):
        part = slice(start, start + _DIGESTS_AT_ONCE)
        digests = np.ascontiguousarray(signatures.sha256[part]).view(f"S{SHA256_BYTES}").ravel()
        low, high = (np.searchsorted(known, digests, side) for side in ("left", "right"))
        count = np.where(signatures.has_sha256[part], high - low, 0)
        for hit, step in _steps(count):
            keeper.add(pictures[low[hit] + step], start + hit, np.zeros(len(hit)))


def _match_hashes(
    suites: Suites,
    signatures: Signatures,
    keeper: MatchKeeper,
    thumbnails: Thumbnailing,
    framing: Framing,
    config: DedupConfig,
    threads: int,
) -> None:
    """Match by hashes within the distance, and by pixels wherever that is asked for."""
    asked, pictures = config.decontaminate, np.flatnonzero(suites.quality >= config.min_quality)
    groups = by_hash(suites.phash, pictures, np.arange(len(suites)))
    found = [np.empty((0, 3), np.int64)]
    for start in range(0, len(signatures), _HASHES_AT_ONCE):
        rows = start + np.flatnonzero(signatures.quality[start : start + _HASHES_AT_ONCE] >= config.min_quality)
        pairs = pairs_between(groups.hashes, signatures.phash[rows], asked.distance, threads)
        pairs[:, 1] = rows[pairs[:, 1]]
        found.append(pairs)
    pairs = np.concatenate(found)
    group, sample, bits = pairs[np.argsort(pairs[:, 1], kind="stable")].T  # each picture of a sample is read about once
    look = _Look(suites, groups, group, thumbnails, framing, config, threads) if asked.confirm else None
    for hit, step in _steps(np.diff(groups.ends)[group]):
        picture = groups.samples[groups.ends[group[hit]] + step]
        if look is not None:
            alike = look(picture, sample[hit])
            picture, hit = picture[alike], hit[alike]
        keeper.add(picture, sample[hit], bits[hit])


class _Look:
    """Compares the pixels of test pictures, all of which are held, with those of some samples at a time."""

    def __init__(
        self, suites: Suites, groups: HashGroups, group: Indices, thumbnails: Thumbnailing,
        framing: Framing, config: DedupConfig, threads: int,
    ) -> None:  # fmt: skip
        near = np.zeros(len(groups.hashes), bool)
        near[group] = True
        self.pictures = np.sort(groups.samples[np.repeat(near, np.diff(groups.ends))])
        self.of_pictures = suites.thumbnails(self.pictures, framing, threads)
        self.of_samples, self.most = thumbnails, config.confirm_difference

    def __call__(self, pictures: Indices, samples: Indices) -> npt.NDArray[np.bool_]:
        some, at = np.unique(samples, return_inverse=True)
        return same(self.of_pictures[np.searchsorted(self.pictures, pictures)], self.of_samples(some)[at], self.most)


def _steps(count: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield for hits `[H]` of `count` pictures each the hit and the step below its count, a few thousand at a time."""
    ends = np.cumsum(count)
    for start in range(0, int(ends[-1]) if len(ends) else 0, _LOOKS_AT_ONCE):
        flat = np.arange(start, min(int(ends[-1]), start + _LOOKS_AT_ONCE))
        hit = np.searchsorted(ends, flat, side="right")
        yield hit, flat - (ends - count)[hit]


def _of_samples(signatures: Signatures, embeddings: Embeddings | None, config: DedupConfig) -> Embeddings:
    """Return the samples' embeddings, those at hand where no others are named; checks all are of one model."""
    asked = config.decontaminate
    path = asked.corpus_embeddings or config.semantic.embeddings
    assert path is not None
    for other in asked.embeddings:
        check_one_model(path, other)
    if embeddings is not None and path == config.semantic.embeddings:
        return embeddings
    return load(path, signatures.keys, scratch=config.semantic.scratch)


def _of_suite(suites: Suites, number: int, config: DedupConfig) -> tuple[Indices, Embeddings]:
    """Return the pictures of a suite that are sound, and their embeddings."""
    pictures = np.flatnonzero((suites.suite == number) & ~suites.is_broken)
    keys = np.asarray([suites.pictures[one].key for one in pictures.tolist()])
    name = suites.names[number]
    return pictures, load(config.decontaminate.embeddings[number], keys, f"pictures of {name}", f"embed {name}")


def _match_embeddings(
    pictures: Indices, of_pictures: Embeddings, of_samples: Embeddings, threshold: float, keeper: MatchKeeper, path: str
) -> None:
    """Match by cosines, a block of them at a time."""
    width, other = of_pictures.vectors.shape[1], of_samples.vectors.shape[1]
    if width != other:
        raise UserError(
            f"{path}: embeddings of {width} numbers, those of the corpus have {other}; embed both with one model"
        )
    known, rows = np.flatnonzero(of_pictures.has), np.flatnonzero(of_samples.has)
    for start in range(0, len(rows), _EMBEDDINGS_AT_ONCE):
        some = rows[start : start + _EMBEDDINGS_AT_ONCE]
        left = of_samples.vectors[some].astype(np.float32)
        for at in range(0, len(known), _EMBEDDINGS_AT_ONCE):
            others = known[at : at + _EMBEDDINGS_AT_ONCE]
            cosines = (left @ of_pictures.vectors[others].astype(np.float32).T).ravel()
            hits = np.flatnonzero(cosines >= threshold)
            if len(hits):
                row, column = np.divmod(hits, len(others))
                keeper.add(pictures[others[column]], some[row], 1 - np.minimum(cosines[hits], 1))


def hidden(
    signatures: Signatures, embeddings: Embeddings | None, gone: npt.NDArray[np.bool_]
) -> tuple[Signatures, Embeddings | None]:
    """Return both with nothing left by which the samples `gone` `[N]` would join any other."""
    if not gone.any():
        return signatures, embeddings
    left = replace(
        signatures, has_sha256=signatures.has_sha256 & ~gone, quality=np.where(gone, np.int16(-1), signatures.quality)
    )
    return left, None if embeddings is None else replace(embeddings, has=embeddings.has & ~gone)
