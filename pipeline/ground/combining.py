"""How the full deltas of several adapters on a weight become one: each thinned, then summed or elected.

The formulas are PEFT's (peft/utils/merge_utils.py; Yadav et al., arXiv:2306.01708; Yu et al.,
arXiv:2311.03099). PEFT applies them to A and B apart, which gives cross terms; here they see B @ A.

What is kept, and which sign wins, is chosen by each delta computed in float64 and rounded once to float32,
whatever the arithmetic of the values. A float32 product differs in its last bits with the height of a
tile and the device, and some elements of a large weight lie that near to a threshold: chosen by those, a
recomputation in float64 would have other elements than the output that it is to prove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pipeline.ground.selecting import Mask, Seen, Selection, Spot

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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

    def open(self, spots: Sequence[Spot], grid: Sequence[tuple[int, int]], seen: Seen) -> Combine:
        """What combines the deltas at these spots; may first look at all of them, by the rows of `grid`."""
        density = self.selection.density
        masks: Sequence[Mask | None] = (
            self.selection.masks(spots, grid, seen) if density < 1 else [None] * len(spots)
        )

        def thinned(rows: Tensor, kept: Tensor | None) -> Tensor:
            if kept is None:
                return rows
            rows = rows * kept
            return rows / density if self.selection.rescales else rows

        def combine(start: int, deltas: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
            ballots, parts = [], []
            for spot, mask, delta in zip(spots, masks, deltas, strict=True):
                seen = delta.float()
                kept = mask(start, seen) if mask else None
                values = seen if dtype == seen.dtype else delta.to(dtype)
                parts.append(thinned(values, kept).mul(spot.factor))
                if self.majority_sign:
                    ballots.append(thinned(seen, kept))
            if self.majority_sign is None:
                return ordered_sum(parts)
            return disjoint_mean(parts, ballots, self.majority_sign)

        return combine


def disjoint_mean(parts: Sequence[Tensor], ballots: Sequence[Tensor], method: MajoritySign) -> Tensor:
    """For each element the mean of those parts whose ballot has the elected sign; 0 where none has.

    A ballot is the delta before its weight, as in PEFT: neither the size nor the sign of a weight votes.
    Where the votes are even, plus wins.
    """
    import torch

    frequency = method is MajoritySign.frequency
    plus = ordered_sum([b.sign() for b in ballots] if frequency else ballots) >= 0
    agreeing, count = [], torch.zeros_like(parts[0])
    for part, ballot in zip(parts, ballots, strict=True):
        agrees = torch.where(plus, ballot, -ballot) > 0
        agreeing.append(part * agrees)
        count += agrees
    return ordered_sum(agreeing).div_(count.clamp_(min=1))


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """The elementwise sum of tensors of one shape, the same bits in whatever order they are given.

    Three floats and more have several sums. Each element's are added from the least to the greatest, which
    a network of exchanges sorts.
    """
    import torch

    parts = list(parts)
    for last in range(len(parts) - 1 if len(parts) > 2 else 0, 0, -1):
        for i in range(last):
            one, other = parts[i : i + 2]
            parts[i], parts[i + 1] = torch.minimum(one, other), torch.maximum(one, other)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
