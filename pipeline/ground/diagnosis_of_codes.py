"""What is wrong with a weight that is held as codes, whose rounding may be larger than the delta.

A fit would find little there. But encoding is exact: what stands there is compared with what its format
makes of all that may have been put into it, and the one whose codes these are is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf, sqrt
from operator import itemgetter
from statistics import fmean
from typing import TYPE_CHECKING

from pipeline.ground.diagnosis import Cause, Codes, Fit, Reading, Sample, is_permutation
from pipeline.ground.factors import SAME_FACTOR, known
from pipeline.ground.rounding import round_to

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 0.01  # of the codes may be others, and a tenth of those that speak against what should stand there
_LOOSE = 2.5  # squared error over that of the nearest codes; rounding by chance comes to twice theirs
_KEPT = 5  # of what may have been encoded is tried with other roundings
_STEPS, _ZOOMS = 16, 4  # in which the factor of a delta is looked for
_HOPELESS = 0.5  # of the codes are others: no factor near will explain them
_SHARP = 0.25  # of the delta: a fit that is as good as this tells it from none, and from all
_DEVIATIONS = 8.0  # from the fitted factor, within which it lies

_Candidate = tuple[Reading, "Tensor", "Tensor"]  # what is wrong if these are codes of base + delta


@dataclass(frozen=True)
class _Rounded:
    """Base and delta as they were added, and the sum before it was encoded."""

    delta: str = ""
    sum: str = ""
    how: str = ""

    def __call__(self, W: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        D = round_to(D, self.delta).double() if self.delta else D
        return (round_to(W + D, self.sum).double(), 0 * D) if self.sum else (W, D)


_ROUNDED = (
    _Rounded(),
    _Rounded("", "BF16", "it was rounded to BF16 before it was quantized"),
    _Rounded("", "F16", "it was rounded to F16 before it was quantized"),
    _Rounded("BF16", "BF16", "delta and sum were rounded to BF16 before it was quantized"),
    _Rounded("F16", "F16", "delta and sum were rounded to F16 before it was quantized"),
)


def read_codes(sample: Sample, codes: Codes) -> Reading:
    """As `diagnosis.read`: the likely cause of what is wrong with one weight."""
    name, W = sample.name, sample.base
    if not bool(sample.stored.isfinite().all()):
        return Reading(name, Cause.not_finite)
    D = W.new_zeros(W.shape) if sample.delta is None else sample.delta
    wrong = 1 - codes.share(W, D)
    if not wrong:
        return Reading(name, None)
    best, missed, enough = Reading(name, Cause.unknown), 1.0, min(_FEW, wrong / 10)
    candidates: Iterable[_Candidate] = _candidates(sample, D)
    for rounded in _ROUNDED:
        tried = list[tuple[float, _Candidate]]()
        for reading, base, delta in candidates:
            now = 1 - codes.share(*rounded(base, delta))
            tried.append((now, (reading, base, delta)))
            if now < missed:
                best, missed = replace(reading, detail=reading.detail or rounded.how), now
            if not missed:
                break
        if not missed or (missed <= enough and best.cause is not Cause.twice_rounded):
            break
        candidates = [candidate for _, candidate in sorted(tried, key=itemgetter(0))[:_KEPT]]
    if missed > enough or (missed and best.cause is Cause.scale):
        near = (best.factor, abs(best.factor) / 2) if missed <= enough else None
        best, missed = min((best, missed), _fitted(sample, codes, near), key=itemgetter(1))
    if missed <= enough:
        return best
    if wrong <= _FEW:
        return Reading(name, Cause.twice_rounded, detail=f"{wrong:.2%} of its codes are not the nearest")
    return _unexplained(sample, codes)


def _candidates(sample: Sample, D: Tensor) -> Iterator[_Candidate]:
    """What may have been encoded: what is wrong then, base, and delta."""
    name, W = sample.name, sample.base
    yield Reading(name, Cause.twice_rounded), W, D
    if sample.delta is not None:
        yield Reading(name, Cause.not_merged, 0.0), W, 0 * D
        for factor, _ in known(sample.scaling):
            yield Reading(name, Cause.scale, factor), W, factor * D
        if D.shape[0] == D.shape[1]:
            yield Reading(name, Cause.mixed, detail="the delta was added transposed"), W, D.T
    for form in sample.four_bit:
        told = Reading(name, Cause.four_bit_form if sample.delta is None else Cause.four_bit_base)
        values = form()
        yield told, values, D
        yield told, round_to(values, "BF16").double(), D


def _fitted(sample: Sample, codes: Codes, near: tuple[float, float] | None) -> tuple[Reading, float]:
    """(reading, misses): the factor of the delta that explains most codes; near a least-squares fit, or
    within `near`, (factor, reach).
    """
    nothing = Reading(sample.name, Cause.unknown), 1.0
    if sample.delta is None or not bool(sample.delta.any()):
        return nothing
    W, D = sample.base, sample.delta
    energy = float((D * D).sum())
    fit = float(((sample.stored - W) * D).sum()) / energy
    middle, reach = near or (fit, max(_DEVIATIONS * sqrt(codes.noise / D.numel() / energy), SAME_FACTOR))
    if reach < _SHARP and min(abs(middle), abs(middle - 1)) <= reach:
        return nothing
    for rounded in _ROUNDED[:2]:
        factor, width = middle, reach
        for _ in range(_ZOOMS):
            tried = [factor + width * (2 * n / _STEPS - 1) for n in range(_STEPS + 1)]
            missed = [1 - codes.share(*rounded(W, f * D)) for f in tried]
            factor = fmean(f for f, m in zip(tried, missed, strict=True) if m == min(missed))
            width *= 4 / _STEPS
            if min(missed) > _HOPELESS:
                break
        if min(missed) <= _FEW and min(abs(factor), abs(factor - 1)) > SAME_FACTOR:
            return Reading(sample.name, Cause.scale, factor), min(missed)
    return nothing


def _unexplained(sample: Sample, codes: Codes) -> Reading:
    """Codes of nothing that a known mistake makes: how far they are from what they should be."""
    W, O = sample.base, sample.stored  # noqa: E741
    target = W if sample.delta is None else W + sample.delta
    error = codes.noise / max(float((target * target).sum()), 1e-300)
    if sample.whole and is_permutation(O, target, 1 - _LOOSE * error):
        return Reading(sample.name, Cause.permuted, detail="its rows stand in another order")
    off = float((O - target).square().sum())
    size = sqrt(max(off - codes.noise, 0.0) / max(float((W * W).sum()), 1e-300))
    if sample.delta is None:
        return Reading(sample.name, Cause.touched, size)
    energy = float(sample.delta.square().sum())
    variance, excess = codes.noise * energy / W.numel(), sqrt(off / codes.noise) if codes.noise else inf
    fit = Fit(float(((O - W) * sample.delta).sum()), energy, variance, excess)
    cause = Cause.other_codes if off <= _LOOSE * codes.noise else Cause.other_base
    return Reading(sample.name, cause, size, fit=fit)
