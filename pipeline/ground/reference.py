"""Merged weights recomputed in float64, and how far what is stored is from that.

What they should be comes of a second path (`pipeline.verification.retracing`), which shares nothing with
what wrote the weights but the decoding of the base's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from math import sqrt
from typing import TYPE_CHECKING, Any

from pipeline.ground.outliers import Lines, Spread
from pipeline.ground.rounding import round_to, ulp

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 4  # row ranges looked at in each weight
_SAMPLE_ELEMENTS = 1 << 16
ULP_BINS = 12  # ten of 0.05 of a unit in the last place, up to one unit, and beyond
MORE_NOISE = 1.1  # what a sum of squares may gain where a scale came out one unit otherwise
SLACK = 2.0**-21  # of |W| + s |B| |A|, elementwise: what a float32 sum may be off by


def sampled_rows(
    name: str, num_rows: int, num_columns: int, grain: int, stack: int = 1
) -> list[tuple[int, int]]:
    """Row ranges to look at, spread over the weight, other ones for other names; all rows of a small one.

    `stack` matrices of equal height in one weight are each looked at.
    """
    if stack > 1:
        height, most = num_rows // stack, max(_SAMPLES * _SAMPLE_ELEMENTS // stack, 1)
        rows = min(max(most // max(num_columns, 1) // grain, 1) * grain, height)
        start = _seed(name) % ((height - rows) // grain + 1) * grain
        return [(n * height + start, n * height + start + rows) for n in range(stack)]
    rows = max(_SAMPLE_ELEMENTS // max(num_columns, 1) // grain, 1) * grain
    if rows * _SAMPLES >= num_rows:
        return [(0, num_rows)]
    seed = _seed(name)
    stride = num_rows // _SAMPLES
    room = max((stride - rows) // grain, 0) + 1
    starts = [(part * stride // grain + (seed >> part) % room) * grain for part in range(_SAMPLES)]
    return [(start, min(start + rows, num_rows)) for start in starts if start < num_rows]


def every_row(num_rows: int, num_columns: int, grain: int, stack: int = 1) -> list[tuple[int, int]]:
    """All rows, in ranges as long as a sample's, each within one matrix of a stack."""
    rows, height = max(_SAMPLE_ELEMENTS // max(num_columns, 1) // grain, 1) * grain, num_rows // stack
    return [
        (n * height + start, n * height + min(start + rows, height))
        for n in range(stack)
        for start in range(0, height, rows)
    ]


def _seed(name: str) -> int:
    return int.from_bytes(sha256(name.encode()).digest()[:4], "little")


@dataclass
class Facts:
    """What the rows of one weight that were looked at showed, against the float64 recomputation."""

    elements: int = 0
    worst_ulp: float = 0.0  # |stored - reference| in units of the last place, less the slack
    worst_raw_ulp: float = 0.0  # with it: large where weight and delta nearly cancel
    ulps: list[int] = field(default_factory=lambda: [0] * ULP_BINS)  # elements by their distance, with it
    beyond: int = 0  # elements farther off than half a unit and the slack
    changed: int = 0
    due: int = 0  # elements that the nearest values change
    not_finite: int = 0
    kept: float = 0.0  # <O - W, D>
    kept_at_best: float = 0.0  # the same of the nearest values that the dtype or the codes have
    variance: float = 0.0  # of kept: the sum of ((O - T) D)^2, as if errors were independent
    energy: float = 0.0  # <D, D>
    before: Spread = field(default_factory=Spread)
    after: Spread = field(default_factory=Spread)
    lines: Lines = field(default_factory=Lines)
    parts: dict[int, Part] = field(default_factory=dict)  # the matrices of a stack
    coded: bool = False  # held as codes: no units in the last place, but noise
    noise: float = 0.0  # <O - T, O - T>
    least_noise: float = 0.0  # the same of the codes that should stand there

    @property
    def retained(self) -> float | None:
        """<O - W, D> / <D, D>; None where nothing was to be added."""
        return self.kept / self.energy if self.energy else None

    @property
    def retained_interval(self) -> tuple[float, float]:
        """That in which it lies but for chance, 95 %: the errors of rounding are as good as independent."""
        return interval(self.kept, self.variance, self.energy)

    @property
    def is_noisy(self) -> bool:
        """Whether codes are farther off in sum than they should be; some turn with a bit of their scale."""
        return self.noise > MORE_NOISE * self.least_noise + (SLACK * SLACK) * self.energy

    def as_dict(self) -> dict[str, Any]:
        units = {"worst_ulp": self.worst_ulp, "worst_raw_ulp": self.worst_raw_ulp, "ulps": self.ulps}
        noise = {"verified_noise": (self.noise / self.energy) ** 0.5 if self.energy else None}
        return {
            "verified_elements": self.elements,
            **(noise if self.coded else units),
            "verified_retained": self.retained,
            "verified_changed_fraction": self.changed / self.elements if self.elements else 0.0,
            **({} if self.coded else {"farthest_row": self.lines.row, "farthest_column": self.lines.column}),
        }


@dataclass
class Part:
    """Of one matrix of a stack, an expert: what was to be added, how many elements changed and had to."""

    energy: float = 0.0
    changed: int = 0
    due: int = 0


def interval(kept: float, variance: float, energy: float) -> tuple[float, float]:
    """95 % interval of kept / energy."""
    share, error = kept / energy, 1.96 * sqrt(variance) / energy
    return share - error, share + error


def size_of_terms(base: Tensor, delta: Tensor) -> Tensor:
    """What stands for |B| |A| for a kind without such a product: the norms of the rows it sums over."""
    W = base.double()
    return (W.norm(dim=1, keepdim=True) + delta.norm(dim=1, keepdim=True)).expand(W.shape)


def compare(
    facts: Facts,
    stored: Tensor,
    dtype: str,
    base: Tensor,
    delta: Tensor,
    size: Tensor,
    start: int = 0,
    by_chance: bool = False,
) -> None:
    """Adds rows start: of a weight to the facts: those stored against base + delta.

    All are `(rows, columns)`, `delta` and `size` float64, `size` what the slack is taken of beside |W|.
    Rounded by chance, a whole unit is right, else half of one.
    """
    W, O = base.double(), stored.double()  # noqa: E741
    target = W + delta
    error, unit, slack = (O - target).abs_(), ulp(target, dtype), (W.abs() + size).mul_(SLACK)
    raw, beyond = error / unit, error - slack
    facts.elements += stored.numel()
    facts.worst_ulp = max(facts.worst_ulp, _most(beyond / unit))
    facts.worst_raw_ulp = max(facts.worst_raw_ulp, _most(raw))
    facts.ulps = [a + b for a, b in zip(facts.ulps, _bins(raw), strict=True)]
    facts.beyond += int((~(error <= (unit if by_chance else unit / 2) + slack)).sum())
    facts.lines.add(start, beyond, unit, delta, dtype)
    best = target.float().to(stored.dtype) if stored.dtype.itemsize < 4 else target.to(stored.dtype)
    gather(facts, W, O, round_to(base, dtype).double(), delta, best.double())


def gather(
    facts: Facts,
    W: Tensor,
    O: Tensor,  # noqa: E741
    unmerged: Tensor,
    D: Tensor,
    best: Tensor,
    slack: float = 0.0,
) -> None:
    """Adds what is asked of numbers and codes alike, all float64: `unmerged` is what would stand for W.

    `best` is as near to W + D as such numbers or codes come; values `slack` apart are the same.
    """
    moved, error = O - W, O - W - D
    facts.changed += int((~((O - unmerged).abs_() <= slack)).sum())
    facts.due += int(((best - unmerged).abs_() > slack).sum())
    facts.not_finite += int((~O.isfinite()).sum())
    facts.kept += _dot(moved, D)
    facts.kept_at_best += _dot(best - W, D)
    facts.variance += float((error * D).square_().sum())
    facts.energy += _dot(D, D)
    facts.before.add(W)
    facts.after.add(O)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.flatten().dot(other.flatten()))


def _bins(ulps: Tensor) -> list[int]:
    """How many elements lie in each of the bins."""
    import torch

    near = ulps.nan_to_num(nan=2.0).clamp(max=2.0).flatten()
    numbers = torch.where(near <= 0.5, (near * 20).ceil().sub_(1).clamp_(min=0), 10 + (near > 1).double())
    found: list[int] = torch.bincount(numbers.long(), minlength=ULP_BINS).tolist()
    return found


def _most(values: Tensor) -> float:
    return float(values.nan_to_num(nan=float("inf")).max())
