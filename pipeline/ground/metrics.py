"""What a merge did to a weight, gathered while its tiles stream past (spec: retained, changed, norms).

Every tile is looked at for non-finite values and for whether anything changed; sums and ranges come from
`SAMPLED_ELEMENTS` elements of each of `SAMPLED_TILES` tiles, spread evenly over the weight, because taking
them all would cost as much as the merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_TILES = 8
SAMPLED_ELEMENTS = 1 << 15


class Moments(NamedTuple):
    """Sums over one sampled tile; W is the weight before, O the stored one, D the delta."""

    elements: int
    changed: int  # O != W rounded to O's dtype
    W: float
    WW: float
    O: float  # noqa: E741  the stored weight
    OO: float
    DD: float
    kept: float  # <O - W, D>
    W_least: float
    W_most: float
    O_least: float
    O_most: float


class TileFacts(NamedTuple):
    """What one tile shows."""

    finite: bool
    changed: bool
    moved: bool  # the delta is not all zero
    moments: Moments | None


def is_sampled(tile: int, num_tiles: int) -> bool:
    """Whether tile number `tile` of `num_tiles` gives its sums."""
    return tile % -(-num_tiles // SAMPLED_TILES) == 0


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    if not values.numel() or not values.is_floating_point():
        return True
    least, most = (float(x) for x in values.aminmax())  # aminmax hands NaN on
    return -inf < least <= most < inf


def tile_facts(stored: Tensor, before: Tensor, rounded: Tensor, delta: Tensor, sampled: bool) -> TileFacts:
    """Facts of a merged tile: `before` the decoded base, `rounded` the same in the stored dtype."""
    import torch

    finite = is_finite(stored)
    changed = not torch.equal(stored, rounded)
    moved = changed or bool(delta.any())
    if not sampled or not stored.numel():
        return TileFacts(finite, changed, moved, None)
    rows = max(SAMPLED_ELEMENTS // stored.shape[1], 1)
    stored, before, rounded, delta = (t[:rows] for t in (stored, before, rounded, delta))
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    W, O, D = (t.to(wide).flatten() for t in (before, stored, delta))  # noqa: E741
    W_least, W_most = (float(x) for x in W.aminmax())
    O_least, O_most = (float(x) for x in O.aminmax())
    moments = Moments(
        elements=stored.numel(),
        changed=int(torch.count_nonzero(stored != rounded)),
        W=float(W.sum()),
        WW=float(W.dot(W)),
        O=float(O.sum()),
        OO=float(O.dot(O)),
        DD=float(D.dot(D)),
        kept=float((O - W).dot(D)),
        W_least=W_least,
        W_most=W_most,
        O_least=O_least,
        O_most=O_most,
    )
    return TileFacts(finite, changed, moved, moments)


@dataclass(frozen=True, slots=True)
class Statistics:
    """One merged weight. Flags are of all of it, the rest of the sampled elements."""

    elements: int
    sampled: int
    finite: bool
    changed: bool
    moved: bool
    retained: float | None  # <O - W, D> / <D, D>; 1: the delta survived rounding, 0: it was swallowed
    changed_fraction: float
    relative_norm: float | None  # ||D|| / ||W||
    before: dict[str, float]  # min, max, mean, std
    after: dict[str, float]
    rounding: str = "nearest"
    noise: float | None = None  # ||O - T|| / ||D|| of a weight stored as codes, T what they stand for
    base_shift: float | None = None  # ||W16 - W|| / ||D|| of one whose base went through four bits

    @classmethod
    def gathered(cls, elements: int, tiles: Iterable[TileFacts]) -> Statistics:
        """Adds up the facts of all tiles of one weight, in tile order."""
        tiles = list(tiles)
        sums = [t.moments for t in tiles if t.moments]
        n = sum(m.elements for m in sums)
        total = {f: sum(getattr(m, f) for m in sums) for f in Moments._fields}
        return cls(
            elements=elements,
            sampled=n,
            finite=all(t.finite for t in tiles),
            changed=any(t.changed for t in tiles),
            moved=any(t.moved for t in tiles),
            retained=total["kept"] / total["DD"] if total["DD"] else None,
            changed_fraction=total["changed"] / n if n else 0.0,
            relative_norm=sqrt(total["DD"] / total["WW"]) if total["WW"] else None,
            before=_spread(
                n,
                total["W"],
                total["WW"],
                min((m.W_least for m in sums), default=0.0),
                max((m.W_most for m in sums), default=0.0),
            ),
            after=_spread(
                n,
                total["O"],
                total["OO"],
                min((m.O_least for m in sums), default=0.0),
                max((m.O_most for m in sums), default=0.0),
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        facts = {f: getattr(self, f) for f in self.__dataclass_fields__}
        return {f: fact for f, fact in facts.items() if fact is not None or f not in ("noise", "base_shift")}


def _spread(n: int, total: float, squares: float, least: float, most: float) -> dict[str, float]:
    mean = total / n if n else 0.0
    variance = squares / n - mean * mean if n else 0.0
    return {"min": least, "max": most, "mean": mean, "std": sqrt(max(variance, 0.0))}
