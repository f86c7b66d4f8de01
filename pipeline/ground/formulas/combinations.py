"""The deltas of several adapters on a weight made one: pruned or thinned, then summed or elected.

Plainly, in float64, of whole weights; what is kept and which sign wins is told by each delta rounded to
float32 (`ground/combining.py` says why). DARE's masks are drawn by the merge's own generator: they are
chance, told by seed, name and place, and nothing else could be held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.ground.combining import Combination, MajoritySign
from pipeline.ground.formulas.module import Rows
from pipeline.ground.selecting import AtRandom, Spot

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # elements of a delta that are computed at a time
Mask = Callable[[int, "Tensor"], "Tensor"]  # mask(start, rows): which elements of float32 rows are kept


def combined(deltas: Sequence[Rows], spots: Sequence[Spot], num_rows: int, how: Combination) -> Rows:
    """Rows of the one delta; spots say whose each is, its factor, how much of the weight it reaches."""
    import torch

    density, elected = how.selection.density, how.majority_sign is not None
    if density == 1:
        masks: Sequence[Mask] = [lambda start, rows: torch.ones_like(rows, dtype=torch.bool)] * len(deltas)
    elif isinstance(how.selection, AtRandom):
        masks = how.selection.masks(spots, (), lambda start, stop: ())
    else:
        masks = [_largest(delta, num_rows, spot, density) for delta, spot in zip(deltas, spots, strict=True)]
    rescale = density if how.selection.rescales else 1.0

    def rows(start: int, stop: int) -> Tensor:
        found = [delta(start, stop) for delta in deltas]
        kept = [mask(start, D.float()) for mask, D in zip(masks, found, strict=True)]
        values = [D * k / rescale for D, k in zip(found, kept, strict=True)]
        if not elected:
            return sum(spot.factor * D for spot, D in zip(spots, values, strict=True))
        ballots = torch.stack([D.float() * k / rescale for D, k in zip(found, kept, strict=True)])
        if how.majority_sign is MajoritySign.frequency:
            plus = ballots.sign().sum(0) >= 0
        else:
            votes = ballots.sort(0).values  # float32 sums depend on their order
            total = votes[0]
            for vote in votes[1:]:
                total = total + vote
            plus = total >= 0
        agree = [(b != 0) & ((b > 0) == plus) for b in ballots]
        count = torch.stack(agree).sum(0).clamp(min=1)
        parts = [spot.factor * D * a for spot, D, a in zip(spots, values, agree, strict=True)]
        return sum(parts) / count

    return rows


def _largest(delta: Rows, num_rows: int, spot: Spot, density: float) -> Mask:
    """Keeps the int(density * reached) largest magnitudes, and what equals the least of them."""
    import torch

    count = int(density * spot.reached)
    if not count:
        return lambda start, rows: torch.zeros_like(rows, dtype=torch.bool)
    sizes = torch.empty(num_rows, spot.num_columns)
    step = max(_BLOCK // spot.num_columns, 1)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        sizes[start:stop] = delta(start, stop).float().abs()
    least = sizes.flatten().kthvalue(sizes.numel() - count + 1).values
    return lambda start, rows: rows.abs() >= least
