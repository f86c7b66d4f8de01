"""Which elements of a weight's deltas are kept: the largest of each, or some at random.

Neither depends on how the weight is cut, on workers, device or memory: a threshold is that of the whole
weight, and chance is a function of the seed and the element's place.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pipeline.ground.errors import Refused
from pipeline.ground.parallel import in_order

if TYPE_CHECKING:
    from torch import Tensor

WORKERS = max(1, min(4, os.cpu_count() or 1))  # threads that look for a threshold, each at a tile
_LOW = 15  # of a magnitude's 31 bits the first pass counts the high 16, the second the low 15
_HIGH_BINS, _LOW_BINS = 1 << 16, 1 << _LOW
_BEYOND = (1 << 31) - 1  # the bits of no number
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # splitmix64's
_FRACTION = 53  # bits of a draw, as many as a double has


class Spot(NamedTuple):
    """A delta on a weight: which weight, whose it is, its factor, and how many elements it reaches."""

    weight: str
    adapter: int
    factor: float
    num_columns: int
    reached: int


Seen = Callable[[int, int], Iterable["Tensor"]]  # seen(start, stop): those rows of every delta, float32
Mask = Callable[[int, "Tensor"], "Tensor"]  # mask(start, rows): which elements of rows from `start` are kept


@dataclass(frozen=True)
class Selection(ABC):
    """Keeps the share `density` of the elements of each delta; Refused unless 0 < density <= 1."""

    density: float

    rescales: ClassVar[bool] = False
    """Whether what is kept is divided by the density, so that the mean stays."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise Refused(
                f"merge.density: {self.density:g} is no share of a delta to keep; give a number above 0, "
                "at most 1"
            )

    @abstractmethod
    def describe(self) -> str:
        """What tells it from another of its kind: density 0.5."""

    def state_bytes(self, num_deltas: int, tile_bytes: int) -> int:
        """Memory that `masks` takes until it is done; `tile_bytes` are those of computing a tile."""
        return 0

    @abstractmethod
    def masks(self, spots: Sequence[Spot], grid: Sequence[tuple[int, int]], seen: Seen) -> list[Mask]:
        """A mask for each delta; `seen` gives them by row ranges, of which `grid` holds all."""


@dataclass(frozen=True)
class Largest(Selection):
    """The int(density * reached) largest magnitudes of each delta; equals of the least of them stay too."""

    def describe(self) -> str:
        return f"density {self.density:g}"

    def state_bytes(self, num_deltas: int, tile_bytes: int) -> int:
        return (WORKERS + 1) * num_deltas * _HIGH_BINS * 8 + WORKERS * tile_bytes

    def masks(self, spots: Sequence[Spot], grid: Sequence[tuple[int, int]], seen: Seen) -> list[Mask]:
        counts = [int(self.density * spot.reached) for spot in spots]
        return [partial(_is_as_large, bits) for bits in thresholds(grid, seen, counts)]


@dataclass(frozen=True)
class AtRandom(Selection):
    """Each element with probability `density`, by the seed, its weight's name, its adapter and its place."""

    seed: int

    rescales: ClassVar[bool] = True

    def describe(self) -> str:
        return f"density {self.density:g}, seed {self.seed}"

    def masks(self, spots: Sequence[Spot], grid: Sequence[tuple[int, int]], seen: Seen) -> list[Mask]:
        return [partial(self._mask, key(self.seed, s.adapter, s.weight), s.num_columns) for s in spots]

    def _mask(self, stream: int, num_columns: int, start: int, rows: Tensor) -> Tensor:
        first = start * num_columns
        drawn = draws(stream, first, first + rows.numel(), str(rows.device))
        return (drawn < int(self.density * 2**_FRACTION)).view(rows.shape)


def thresholds(grid: Sequence[tuple[int, int]], seen: Seen, counts: Sequence[int]) -> list[int]:
    """For each delta the bits of its counts[i]-th largest magnitude, exactly, in two passes over all rows.

    A radix select: without the sign, the bits of float32 are ordered as the magnitudes. Where a count is 0
    nothing is as large as the threshold.
    """
    if not any(counts):
        return [_BEYOND] * len(counts)
    high = _histograms(grid, seen, _HIGH_BINS, lambda number, bits: bits >> _LOW)
    heads = [_reached(histogram, count) for histogram, count in zip(high, counts, strict=True)]
    low = _histograms(
        grid,
        seen,
        _LOW_BINS,
        lambda number, bits: bits[bits >> _LOW == heads[number][0]] & (_LOW_BINS - 1),
    )
    found = []
    for (head, rest), histogram, count in zip(heads, low, counts, strict=True):
        found.append(head << _LOW | _reached(histogram, rest)[0] if count else _BEYOND)
    return found


def _histograms(
    grid: Sequence[tuple[int, int]], seen: Seen, bins: int, binned: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """How many elements of each delta fall into each bin."""
    import torch

    def counted(start: int, stop: int) -> list[Tensor]:
        return [
            torch.bincount(binned(number, magnitude_bits(rows)).flatten(), minlength=bins)
            for number, rows in enumerate(seen(start, stop))
        ]

    with in_order((partial(counted, *rows) for rows in grid), WORKERS, WORKERS) as counts:
        total = next(counts)
        for more in counts:
            for histogram, count in zip(total, more, strict=True):
                histogram += count
    return total


def _reached(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the count-th largest lies, and which of the bin's own it is."""
    import torch

    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, max(count, 1)))
    return len(histogram) - 1 - place, count - (int(above[place - 1]) if place else 0)


def magnitude_bits(rows: Tensor) -> Tensor:
    """float32 without the sign, as int32: NaN above infinity above every number."""
    import torch

    return rows.view(torch.int32) & _BEYOND


def _is_as_large(bits: int, start: int, rows: Tensor) -> Tensor:
    return magnitude_bits(rows) >= bits


def key(seed: int, adapter: int, weight: str) -> int:
    """The stream of draws of one adapter on one weight: 64 bits."""
    return int.from_bytes(sha256(f"{seed} {adapter} {weight}".encode()).digest()[:8], "little")


def draws(stream: int, start: int, stop: int, device: str) -> Tensor:
    """Draws number start to stop of a stream, int64 below 2^53: the upper bits of `words`."""
    z = words(stream, start, stop, device)
    return z.bitwise_right_shift_(64 - _FRACTION).bitwise_and_((1 << _FRACTION) - 1)


def words(stream: int, start: int, stop: int, device: str) -> Tensor:
    """Words number start to stop of a stream, 64 random bits each as int64: splitmix64.

    Word i is mix(stream + (i + 1) * golden) (Steele, Lea and Flood, OOPSLA 2014): nothing comes before it.
    int64 wraps as uint64 does; its shifts bring in the sign, which is masked off.
    """
    import torch

    z = torch.arange(start + 1, stop + 1, device=device).mul_(_signed(_GOLDEN)).add_(_signed(stream))
    shifted = torch.empty_like(z)
    for shift, factor in (*_MIX, (31, 1)):
        torch.bitwise_right_shift(z, shift, out=shifted).bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(shifted)
        if factor != 1:
            z.mul_(_signed(factor))
    return z


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
