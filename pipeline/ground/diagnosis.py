"""What is wrong with a merge that somebody else made, from samples of its weights in float64.

Every weight is read by itself: by how much of the delta is in what was stored (fitting.py), and by whether
rounding alone explains the rest; codes, whose rounding hides a delta, in diagnosis_of_codes.py. Causes are
then told together, each with the weights that it holds for (causes.py). Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.factors import SAME_FACTOR, Scaling
from pipeline.ground.fitting import EXACT, exact_factor, fitted_factor
from pipeline.ground.reference import SLACK
from pipeline.ground.rounding import round_to, ulp

if TYPE_CHECKING:
    from torch import Tensor

_LOOSE = 9.0  # squared error over that of one rounding: what arithmetic in 16 bits may come to
ALIKE = 0.95  # cosine of rows that are the same up to rounding and scale
_MOSTLY = 0.9  # cosine of what is the same but for another rounding
NF4 = "4-bit (NF4)"  # what people call it
_FEW = 0.01  # of the values may be others
_ROUNDED = 0.75  # of a unit in the last place: what one rounding, and some slack, moves less than
_GRID = 16  # values that a block of four-bit codes can have
_BLOCK = 64


class Cause(Enum):
    """What may be wrong, in the order in which it is told."""

    not_finite = "not finite"
    quantized = "quantized"
    coded_base = "added to a coded form of the base"
    coded_form = "a coded form of the base"
    other_base = "another base"
    other_codes = "codes of another rule"
    not_merged = "not merged"
    scale = "scale"
    partly = "partly merged"
    weights = "other weights of the adapters"
    swapped = "swapped"
    permuted = "permuted"
    mixed = "mixed up"
    twice_rounded = "rounded more than once"
    touched = "touched"
    unknown = "unknown"


@dataclass(frozen=True)
class Codes:
    """The format that rows are held in."""

    are: Callable[[Tensor, Tensor], Tensor]
    """are(base, delta): for each element that stands there, whether the format makes it of base + delta"""
    nearest: Callable[[Tensor], Tensor]
    """what the format makes of values"""
    noise: float
    """<X - T, X - T> of T, what should stand there, and its own codes X"""

    def share(self, base: Tensor, delta: Tensor) -> float:
        """Of the elements that stand there, those that the format makes of base + delta."""
        return float(self.are(base, delta).double().mean())


@dataclass(frozen=True)
class Sample:
    """Rows of a weight, float64 `(rows, columns)`: base, what was to be added (None: nothing), stored."""

    name: str
    base: Tensor
    delta: Tensor | None
    stored: Tensor
    dtype: str  # of what is stored; of codes, what they are called
    scaling: Scaling | None = None
    whole: bool = False  # all rows of the weight
    codes: Codes | None = None
    four_bit: tuple[Callable[[], Tensor], ...] = ()  # the base in NF4, its scales as they are, and nested
    apart: Mapping[int, Callable[[], Tensor]] = field(
        default_factory=dict
    )  # what each of several adapters adds


class Fit(NamedTuple):
    """Of what nothing explains: how much of the delta it holds, and how far off it is."""

    kept: float  # <O - W, D>
    energy: float  # <D, D>
    variance: float  # of kept, by what else is off
    excess: float = 0.0  # of codes, root of the squared error over that of the right ones


@dataclass(frozen=True)
class Reading:
    """What one weight shows: a cause, or None where it is right."""

    name: str
    cause: Cause | None
    factor: float = 1.0  # how many times the delta is in it
    detail: str = ""
    uncertain: float = 0.0  # what rounding may have done to the factor
    fit: Fit | None = None
    also: tuple[Reading, ...] = ()  # what else it may be
    merged: bool = True  # whether there was something to add
    scaling: Scaling | None = None
    sample: Sample | None = None  # where it may be another weight's


def read(sample: Sample) -> Reading:
    """The likely cause of what is wrong with one weight."""
    W, O = sample.base, sample.stored  # noqa: E741
    if not bool(O.isfinite().all()):
        return Reading(sample.name, Cause.not_finite)
    D = W.new_zeros(W.shape) if sample.delta is None else sample.delta
    target = W + D
    unit = ulp(target, sample.dtype)
    error = (O - target).abs()
    if bool((error <= unit / 2 + SLACK * (W.abs() + D.abs() + W.abs().mean())).all()):
        return Reading(sample.name, None)
    if _cuts(sample) and _on_grid(O) and not _on_grid(W):
        return Reading(sample.name, Cause.quantized)
    if narrow := _narrower(sample, target):
        return Reading(sample.name, Cause.twice_rounded, detail=narrow)
    unit = ulp(target.abs().maximum(O.abs()), sample.dtype)
    noise = float((unit * unit).sum()) / 12
    energy = float((D * D).sum())
    if not energy:
        return _untouched(sample, O - W, noise)
    factor = exact_factor(W, D, O, sample.dtype, sample.scaling)
    if factor is not None:
        return Reading(sample.name, Cause.scale if factor else Cause.not_merged, factor, uncertain=EXACT)
    E = O - W
    if share := _merged_share(sample, E, D):
        return Reading(sample.name, Cause.partly, share)
    slope = float((E * D).sum()) / energy
    rest = float(((E - slope * D) ** 2).sum())
    if rest <= _LOOSE * noise + (SLACK * slope) ** 2 * energy:
        return _fitted(sample, D, target)
    return _unexplained(sample, E, D, target, noise)


def _fitted(sample: Sample, D: Tensor, target: Tensor) -> Reading:
    """A weight that holds a number times the delta, and some rounding."""
    factor, uncertain = fitted_factor(sample.base, D, sample.stored, sample.dtype, _LOOSE)
    near = min((0.0, 1.0), key=lambda plain: abs(factor - plain))
    if abs(factor - near) > max(SAME_FACTOR, uncertain):
        return Reading(sample.name, Cause.scale, factor, uncertain=uncertain)
    if not near:
        return Reading(sample.name, Cause.not_merged, factor, uncertain=uncertain)
    return Reading(sample.name, Cause.twice_rounded, factor, _rounded_how(sample, target), uncertain)


def _untouched(sample: Sample, E: Tensor, noise: float) -> Reading:
    """A weight that the merge was to leave alone, and did not."""
    off = float((E * E).sum())
    if off <= _LOOSE * noise:
        return Reading(sample.name, Cause.twice_rounded)
    if _is_off_by_four_bits(sample, E):
        return Reading(sample.name, Cause.coded_form, detail=NF4)
    size = off / max(float((sample.base**2).sum()), 1e-300)
    return Reading(sample.name, Cause.touched, sqrt(size))


def _is_off_by_four_bits(sample: Sample, off: Tensor) -> bool:
    """Whether it is what four bits make of the base, and then some rounding."""
    return any(_cosine(off, form() - sample.base) > _MOSTLY for form in sample.four_bit[:1])


def _unexplained(sample: Sample, E: Tensor, D: Tensor, target: Tensor, noise: float) -> Reading:
    """Not the delta times a number: whose values these are."""
    name = sample.name
    if sample.apart:
        told, off = weighted(sample)
        if off <= _LOOSE * noise:
            return Reading(name, Cause.weights, detail=told)
    if sample.whole and is_permutation(sample.stored, target):
        return Reading(name, Cause.permuted, detail="its rows stand in another order")
    if (
        sample.delta is not None
        and sample.delta.shape[0] == sample.delta.shape[1]
        and _cosine(E, D.T) > ALIKE
    ):
        return Reading(name, Cause.mixed, detail="the delta was added transposed")
    other = E - D
    if _is_off_by_four_bits(sample, other):
        return Reading(name, Cause.coded_base, detail=NF4)
    if _in_row_space(E, D, noise):
        return Reading(name, Cause.mixed, detail="rows of A meet the wrong columns of B")
    off, energy = float((other * other).sum()), float((D * D).sum())
    size = sqrt(off / max(float((sample.base**2).sum()), 1e-300))
    return Reading(
        name, Cause.other_base, size, fit=Fit(float((E * D).sum()), energy, off * energy / D.numel())
    )


def _rounded_how(sample: Sample, target: Tensor) -> str:
    """Which extra rounding gives exactly what is stored."""
    O, W, dtype = sample.stored, sample.base, sample.dtype  # noqa: E741
    assert sample.delta is not None
    if dtype in ("BF16", "F16"):
        first = round_to(sample.delta, dtype).double()
        if bool((round_to(W + first, dtype).double() == O).double().mean() > 0.999):
            return (
                f"the delta was rounded to {dtype} before it was added, as PEFT does it with safe_merge, and "
                "always on embeddings and stacked experts"
            )
    for narrow in ("BF16", "F16"):
        base = round_to(W, narrow).double()
        if bool((round_to(base + sample.delta, dtype).double() == O).double().mean() > 0.999):
            return f"the base was rounded to {narrow} before the delta was added, as dequantizing first does"
    return "arithmetic in 16 bits"


def _narrower(sample: Sample, target: Tensor) -> str:
    """The dtype through which the right values went on their way to a finer one."""
    for narrow in ("BF16", "F16"):
        same = round_to(round_to(target, narrow).double(), sample.dtype).double() == sample.stored
        if narrow != sample.dtype and bool(same.double().mean() > 0.999):
            return f"it was rounded to {narrow} before it was stored as {sample.dtype}"
    return ""


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0


def is_permutation(O: Tensor, target: Tensor, alike: float = 0.999) -> bool:  # noqa: E741
    """Whether the rows of O are those of the target up to rounding, and not all in their places."""
    import torch

    rows, others = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (O, target))
    best = (rows @ others.T).max(1)
    moved = int((best.indices != torch.arange(len(O))).sum())
    paired = bool((best.values > alike).all()) and len(set(best.indices.tolist())) > 0.95 * len(O)
    return paired and moved > 0.05 * len(O)


def weighted(sample: Sample) -> tuple[str, float]:
    """By how much the delta of each of several adapters is in it, and the squared error of that."""
    import torch

    deltas = torch.stack([delta().flatten() for delta in sample.apart.values()], 1)
    moved = (sample.stored - sample.base).reshape(-1, 1)
    factors = torch.linalg.lstsq(deltas, moved).solution
    found = zip(sample.apart, factors.flatten().tolist(), strict=True)
    told = ", ".join(f"{round(f, 2) + 0.0:g} times that of adapter {number + 1}" for number, f in found)
    return told, float((moved - deltas @ factors).square().sum())


def _merged_share(sample: Sample, E: Tensor, D: Tensor) -> float:
    """Of values that are the base's or base + delta, up to rounding: the share of the latter; else 0.

    Told by those whose delta is more than rounding.
    """
    unit = ulp(sample.base.abs().maximum(sample.stored.abs()), sample.dtype)
    telling = D.abs() > 2 * unit
    if int(telling.sum()) < _BLOCK:
        return 0.0
    merged, left = (off.abs()[telling] / unit[telling] for off in (E - D, E))
    if bool((merged.minimum(left) > _ROUNDED).double().mean() > _FEW):
        return 0.0
    share = float((merged < left).double().mean())
    return share if _FEW < share < 1 - _FEW else 0.0


def _in_row_space(E: Tensor, D: Tensor, noise: float) -> bool:
    """Whether the rows of E are combinations of those of D, as those of any B' @ A are, up to rounding."""
    import torch

    _, S, V = torch.linalg.svd(D, full_matrices=False)
    rank = int(S.gt(S[0] * 1e-9).sum())
    if rank >= min(D.shape) / 2:
        return False
    outside = float((E - E @ V[:rank].T @ V[:rank]).square().sum())
    return outside <= _LOOSE * noise and outside < 0.1 * float(E.square().sum())


def _cuts(sample: Sample) -> bool:
    """Whether blocks of 64 in file order can be told."""
    return sample.base.shape[1] % _BLOCK == 0 or (sample.whole and sample.base.numel() % _BLOCK == 0)


def _on_grid(values: Tensor) -> bool:
    """Whether blocks along the rows hold so few values that four bits tell them apart."""
    blocks = values.reshape(-1, _BLOCK).sort(1).values
    distinct = (blocks.diff(dim=1) != 0).sum(1) + 1
    return bool(((distinct <= _GRID) & (distinct > 2)).double().mean() > 0.95)
