"""How the full deltas of several adapters on a weight become one: each thinned, then summed or elected.

The formulas are PEFT's (peft/utils/merge_utils.py; Yadav et al., arXiv:2306.01708; Yu et al.,
arXiv:2311.03099). PEFT applies them to A and B apart, which gives cross terms; here they see B @ A.

What is kept, and which sign wins, is chosen by each delta computed in float64 and rounded once to float32,
whatever the arithmetic of the values. A float32 product differs in its last bits with the height of a
tile and the device, and some elements of a large weight lie that near to a threshold: chosen by those, a
recomputation in float64 would have other elements than the output that it is to prove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from pipeline.ground.selecting import Mask, Seen, Selection, Spot

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class MajoritySign(Enum):
    """By what the sign of an element is elected: the sum of the deltas, or the number of each sign."""

    total = "total"
    frequency = "frequency"


# combine(start, deltas, dtype): rows from `start` of the one delta in `dtype`, of those of each in float64
Combine = Callable[[int, Iterable["Tensor"], "torch.dtype"], "Tensor"]


@dataclass(frozen=True)
class Combination:
    """A way to combine deltas: what of each is kept, and whether signs are elected or all of it is summed."""

    method: str  # as the request names it
    selection: Selection
    majority_sign: MajoritySign | None = None

    def describe(self) -> str:
        """For the plan: ties, density 0.5, signs by total."""
        election = f", signs by {self.majority_sign.value}" if self.majority_sign else ""
        return f"{self.method}, {self.selection.describe()}{election}"

    def state_bytes(self, num_deltas: int, tile_bytes: int) -> int:
        """Memory that `open` takes; `tile_bytes` are those of computing a tile."""
        return self.selection.state_bytes(num_deltas, tile_bytes) if self.selection.density < 1 else 0

    def open(self, spots: Sequence[Spot], grid: Sequence[tuple[int, int]], seen: Seen) -> Combine:
        """What combines the deltas at these spots; may first look at all of them, by the rows of `grid`."""
        density = self.selection.density
        masks: Sequence[Mask | None] = (
            self.selection.masks(spots, grid, seen) if density < 1 else [None] * len(spots)
        )

        def thinned(
            start: int, mask: Mask | None, delta: Tensor, dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            """What is kept of a delta, in float32 and in `dtype`."""
            seen = delta.float()
            rows = seen if dtype == seen.dtype else delta.to(dtype)
            if mask is None:
                return seen, rows
            kept = mask(start, seen)
            found = [r * kept for r in ([seen] if rows is seen else [seen, rows])]
            if self.selection.rescales:
                found = [r.div_(density) for r in found]
            return found[0], found[-1]

        def combine(start: int, deltas: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
            kept = [thinned(start, mask, delta, dtype) for mask, delta in zip(masks, deltas, strict=True)]
            if self.majority_sign is None:
                parts = [rows * spot.factor for spot, (_, rows) in zip(spots, _emptying(kept), strict=True)]
                return ordered_sum(parts)
            plus = elected([seen for seen, _ in kept], self.majority_sign)
            return disjoint_mean(kept, [spot.factor for spot in spots], plus)

        return combine


def elected(ballots: list[Tensor], method: MajoritySign) -> Tensor:
    """Where the elected sign is plus; it is where the votes are even.

    A ballot is a delta before its weight, as in PEFT: neither the size nor the sign of a weight votes.
    """
    if method is MajoritySign.total:
        return ordered_sum(ballots) >= 0
    votes = ballots[0].sign()
    for ballot in ballots[1:]:
        votes += ballot.sign()  # whole numbers: no order
    return votes >= 0


def disjoint_mean(kept: list[tuple[Tensor, Tensor]], factors: Sequence[float], plus: Tensor) -> Tensor:
    """For each element the mean of those weighted deltas that have the elected sign; 0 where none has.

    `kept` holds each delta as it was seen, float32, and in the dtype of the result; it is emptied.
    """
    count = kept[0][1].new_zeros(plus.shape)
    parts = []
    for factor, (seen, rows) in zip(factors, _emptying(kept), strict=True):
        agrees = ((seen > 0) == plus) & (seen != 0)
        parts.append(rows * factor * agrees)
        count += agrees
    return ordered_sum(parts).div_(count.clamp_(min=1))


def _emptying(items: list[T]) -> Iterator[T]:
    """The items in order, none of which stays in memory for the list's sake."""
    items.reverse()
    while items:
        yield items.pop()


def ordered_sum(parts: list[Tensor]) -> Tensor:
    """The elementwise sum of tensors of one shape, the same bits in whatever order they are given.

    Three floats and more have several sums. Each element's are added from the least to the greatest, which
    a network of exchanges sorts, in the list itself.
    """
    import torch

    for last in range(len(parts) - 1 if len(parts) > 2 else 0, 0, -1):
        for i in range(last):
            one, other = parts[i : i + 2]
            parts[i], parts[i + 1] = torch.minimum(one, other), torch.maximum(one, other)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
