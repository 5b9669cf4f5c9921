"""Which sample at which step: a pure function of (seed, epoch, step, slot), in O(1) memory.

Blocks of consecutive samples are put in a keyed random order; that sequence is cut into `lanes` runs of equal
sample count; inside its lane a sample is moved about within a window of blocks. Nothing here touches a disk,
and nothing depends on world size, worker count or time.

The permutations are Feistel networks with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, section 4), the round function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from infra.errors import UserError

Remainder = Literal["drop", "pad", "keep"]
REMAINDERS: tuple[Remainder, ...] = ("drop", "pad", "keep")
"""By the number that a stream's state has for each."""
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

MOST_LANES = 1024
MOST_BLOCK_SAMPLES = 256
WINDOW_BLOCKS = 8
RESIDENT_BYTES_PER_SLOT = 4 * 2**20
"""Windows held in memory over all ranks, in bytes a sample of the global batch; bounds the block size."""

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUND_KEYS = [np.uint64(_GOLDEN * (2 * number + 1) & _MASK) for number in range(ROUNDS)]
_CHUNK_SLOTS = 1 << 16


def default_lanes(global_batch: int) -> int:
    """Return the largest divisor of the global batch up to 1,024."""
    return max(count for count in range(1, min(global_batch, MOST_LANES) + 1) if global_batch % count == 0)


def default_block_samples(samples: int, global_batch: float, lanes: int, sample_bytes: float) -> int:
    """Return how many consecutive samples one ranged read takes: 256 where nothing stands against it.

    Fewer in a small corpus, so that every lane still draws on `WINDOW_BLOCKS` blocks, and fewer where windows
    of such blocks (at `sample_bytes` a sample on average) would fill the memory. `global_batch` are the slots of a
    step that the corpus fills, on average where it is one of a mix.
    """
    a_lane = samples // lanes
    resident = global_batch * RESIDENT_BYTES_PER_SLOT / (lanes * WINDOW_BLOCKS * max(1.0, sample_bytes))
    return max(1, min(MOST_BLOCK_SAMPLES, a_lane // WINDOW_BLOCKS, int(resident)))


class TooFewSamplesError(UserError):
    """A corpus smaller than a batch."""


@dataclass(frozen=True)
class Step:
    """One step's samples for some lanes, by slot `[B]`: all arrays are `[B]` and hold int64.

    A run is what one ranged read brings: samples `[first[i], stop[i])`, of which sample `sample[i]` is one.
    Equal `run` means the same run, which no step after `until` needs.
    """

    epoch: int
    step: int
    slot: Ints
    sample: Ints
    run: Ints
    first: Ints
    stop: Ints
    until: Ints


@dataclass(frozen=True)
class Order:
    """The order of `samples` samples in batches of `global_batch`.

    `remainder` says what becomes of the samples that do not fill a batch at the end of an epoch: `drop`
    leaves them out (others each epoch), `keep` makes a smaller last batch of them, spread evenly over the
    ranks, `pad` fills that batch up with samples from the beginning of the epoch.

    Raises:
        UserError: the lanes do not divide the batch.
        TooFewSamplesError: the corpus is smaller than a batch under `drop`.
    """

    samples: int
    global_batch: int
    lanes: int
    block_samples: int
    window_blocks: int = WINDOW_BLOCKS
    seed: int = 0
    remainder: Remainder = "drop"

    def __post_init__(self) -> None:
        for name in ("global_batch", "lanes", "block_samples", "window_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; give 1 or more")
        if self.global_batch % self.lanes:
            raise UserError(f"lanes: {self.lanes} do not divide the global batch of {self.global_batch}")
        if self.remainder not in REMAINDERS:
            raise UserError(f"remainder: {self.remainder!r}; give 'drop', 'pad' or 'keep'")
        if self.samples < 1:
            raise UserError("the corpus holds no samples")
        if self.steps < 1:
            raise TooFewSamplesError(
                f"the corpus holds {self.samples} samples, less than a global batch of {self.global_batch}; "
                "take a smaller batch, or remainder 'pad' or 'keep'"
            )

    @property
    def full_steps(self) -> int:
        """Steps of an epoch whose every slot has a sample of its own."""
        return self.samples // self.global_batch

    @property
    def left_over(self) -> int:
        """Samples of an epoch that do not fill a batch."""
        return self.samples % self.global_batch

    @property
    def steps(self) -> int:
        """Steps of an epoch, at every world size."""
        return self.full_steps + (self.remainder != "drop" and self.left_over > 0)

    @property
    def lane_slots(self) -> int:
        """Slots a lane fills in a step."""
        return self.global_batch // self.lanes

    def batch(self, epoch: int, step: int) -> Ints:
        """Return the sample in every slot of a step, `[global_batch]`; -1 in a slot left empty by `keep`."""
        filled = np.full(self.global_batch, -1, dtype=np.int64)
        (one,) = self.walk(epoch, step, step + 1)
        filled[one.slot] = one.sample
        return filled

    def walk(self, epoch: int, start: int = 0, stop: int | None = None, lanes: range | None = None) -> Iterator[Step]:
        """Yield the steps `[start, stop)` of an epoch (by default to its end) for some lanes."""
        stop = self.steps if stop is None else min(stop, self.steps)
        lanes = range(self.lanes) if lanes is None else lanes
        chunk = max(1, _CHUNK_SLOTS // (len(lanes) * self.lane_slots))
        full = min(stop, self.full_steps)
        for first in range(start, full, chunk):
            yield from self._full(epoch, first, min(first + chunk, full), lanes)
        if max(start, full) < stop:
            yield self._last(epoch, lanes)

    def _full(self, epoch: int, start: int, stop: int, lanes: range) -> Iterator[Step]:
        a_step = self.lane_slots
        lane = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), a_step)
        turn = np.tile(np.arange(a_step, dtype=np.int64), len(lanes))
        steps = np.arange(start, stop, dtype=np.int64)[:, None]
        sample, run, first, end, closes = self.locate(epoch, lane, steps * a_step + turn)
        until = (closes - 1) // a_step
        slot = lane * a_step + turn
        for row, step in enumerate(range(start, stop)):
            yield Step(epoch, step, slot, sample[row], run[row], first[row], end[row], until[row])

    def locate(self, epoch: int, lane: Ints, within: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """Return what stands at places of an epoch: sample, run, the run's first and stop, the end of its window.

        `within` counts a lane's places from 0, and so does the end of the window, which is the first place that
        needs the run no more. Both arguments broadcast.
        """
        lane_start = lane * (self.full_steps * self.lane_slots)
        number, opens, closes = self._windows(lane, within)
        keys = _key(self.seed, epoch, 1, lane, number)
        moved = opens + permute(within - opens, closes - opens, keys)
        return *self._runs(epoch, lane_start + moved, lane_start + opens, lane_start + closes), closes

    def _windows(self, lane: Ints, within: Ints) -> tuple[Ints, Ints, Ints]:
        """Return number, start and end of the window that each place in a lane lies in.

        Each lane's first window is cut short by its own amount (a golden-ratio sequence), so that the lanes
        do not all come to the end of a window, and to new reads, at the same step.
        """
        lane_samples = self.full_steps * self.lane_slots
        size = min(self.window_blocks * self.block_samples, lane_samples)
        golden = (lane.astype(np.uint64) * np.uint64(_GOLDEN)) >> np.uint64(32)
        cut = (golden.astype(np.int64) * size) >> 32 if size < lane_samples else np.zeros_like(lane)
        number = np.where(within < cut, 0, 1 + (within - cut) // size)
        opens = np.where(number == 0, 0, cut + (number - 1) * size)
        closes = np.minimum(cut + number * size, lane_samples)
        return number, opens, closes

    def _last(self, epoch: int, lanes: range) -> Step:
        """The step of what is left over: place `i` of `left_over` in slot `i * global_batch // left_over`."""
        batch, left = self.global_batch, self.left_over
        slot = np.arange(lanes.start * self.lane_slots, lanes.stop * self.lane_slots, dtype=np.int64)
        place = -(-slot * left // batch)  # how many are placed before the slot
        filled = (place < left) & (place * batch // left == slot)
        position = np.where(filled, self.full_steps * batch + place, (slot - place) % self.samples)
        if self.remainder == "keep":
            slot, position = slot[filled], position[filled]
        sample, _, _, _ = self._runs(epoch, position, position, position + 1)
        one = np.full(len(slot), self.full_steps, dtype=np.int64)
        return Step(epoch, self.full_steps, slot, sample, self.samples + slot, sample, sample + 1, until=one)

    def _runs(self, epoch: int, position: Ints, opens: Ints, closes: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return sample, run, first and stop of places in the epoch's sequence of blocks."""
        size, blocks = self.block_samples, _blocks(self.samples, self.block_samples)
        missing = blocks * size - self.samples  # what the corpus' last block is short of
        key, short_at = _epoch(self.seed, epoch, blocks)
        short_end = (short_at + 1) * size - missing
        shifted = position + missing * (position >= short_end)
        turn, offset = shifted // size, shifted % size
        start = turn * size - missing * (turn > short_at)
        end = start + size - missing * (turn == short_at)
        sample = permute(turn, blocks, key) * size + offset
        run, run_end = np.maximum(start, opens), np.minimum(end, closes)
        return sample, run, sample - (position - run), sample + (run_end - position)


def substitute(hole: int, samples: int) -> Iterator[int]:
    """Yield the samples to try, in this order, in the place of a bad one: neighbours, then far ones."""
    for distance in range(1, min(8, samples)):
        yield (hole + distance) % samples
    for number in range(56):
        yield int(_key(hole, number)[0]) % samples


def permute(index: Ints, size: Any, key: Any, *, inverse: bool = False) -> Ints:
    """Return where each `index` in `[0, size)` goes under the permutation that `key` (uint64) names.

    `size` and `key` are single or of the shape of `index`.
    """
    words = index.astype(np.uint64)
    size, key = np.asarray(size, dtype=np.uint64), np.asarray(key, dtype=np.uint64)
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    out = _rounds(words, bits, key, inverse)
    walking = np.flatnonzero(out >= size)
    flat = out.reshape(-1)
    each_bits, each_size, each_key = (np.broadcast_to(part, out.shape).reshape(-1) for part in (bits, size, key))
    while len(walking):
        flat[walking] = _rounds(flat[walking], each_bits[walking], each_key[walking], inverse)
        walking = walking[flat[walking] >= each_size[walking]]
    return flat.reshape(index.shape).astype(np.int64)


def _rounds(words: Words, bits: Words, key: Words, inverse: bool) -> Words:
    low_bits = (bits + np.uint64(1)) >> np.uint64(1)
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    low, high = words & low_mask, words >> low_bits
    for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        if number % 2:
            low = low ^ (_scramble((high + key) ^ _ROUND_KEYS[number]) & low_mask)
        else:
            high = high ^ (_scramble((low + key) ^ _ROUND_KEYS[number]) & high_mask)
    return (high << low_bits) | low


def _scramble(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def _key(*parts: Any) -> Words:
    """Return a uint64 key for whole numbers or arrays of them; every part counts."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.uint64(part & _MASK) if isinstance(part, int) else part.astype(np.uint64)
        key = _scramble((key ^ word) + np.uint64(_GOLDEN))
    return key


def _blocks(samples: int, block_samples: int) -> int:
    return -(-samples // block_samples)


@functools.lru_cache(maxsize=64)
def _epoch(seed: int, epoch: int, blocks: int) -> tuple[np.uint64, int]:
    """Return the key of the epoch's block order, and the turn at which the corpus' last block comes."""
    key = _key(seed, epoch, 0)[0]
    last = np.array([blocks - 1], dtype=np.int64)
    return key, int(permute(last, blocks, key, inverse=True)[0])
