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

from pipeline.ground.diagnosis import NF4, Cause, Codes, Fit, Reading, Sample, is_permutation, weighted
from pipeline.ground.factors import SAME_FACTOR, known
from pipeline.ground.rounding import round_to

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 0.01  # of the codes may be others, and a tenth of those that speak against what should stand there
_LOOSE = 2.5  # squared error over that of the nearest codes; rounding by chance comes to twice theirs
_AS_NEAR = 1.05  # the same, of values that are encoded as what should stand there is
_FARTHER = 1.02  # the same, of a fit that explains more than chance does
_KEPT = 5  # of what may have been encoded is tried with other roundings
_STEPS, _ZOOMS = 16, 4  # in which the factor of a delta is looked for
_HOPELESS = 0.5  # of the codes are others: no factor near will explain them
_SHARP = 0.25  # of the delta: a fit that is as good as this tells it from none, and from all
_DEVIATIONS = 8.0  # from the fitted factor, within which it lies

_Candidate = tuple[Reading, "Tensor", "Tensor"]  # what is wrong if these are codes of base + delta


@dataclass(frozen=True)
class _Rounded:
    """The dtypes that base, delta and sum were rounded to before the sum was encoded; "" for none."""

    base: str
    delta: str
    sum: str
    how: str

    def __call__(self, W: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        W, D = (round_to(t, to).double() if to else t for t, to in ((W, self.base), (D, self.delta)))
        return (round_to(W + D, self.sum).double(), 0 * D) if self.sum else (W, D)


def _in(dtype: str) -> tuple[_Rounded, ...]:
    return (
        _Rounded(
            dtype, "", "", f"the base was rounded to {dtype} before the delta was added, as PEFT does it"
        ),
        _Rounded("", "", dtype, f"it was rounded to {dtype} before it was quantized"),
        _Rounded("", dtype, dtype, f"delta and sum were rounded to {dtype} before it was quantized"),
    )


_EXACT = _Rounded("", "", "", "")
_NARROW = (*_in("BF16"), *_in("F16"))
_SUM_IN_BF16 = _NARROW[1]


def read_codes(sample: Sample, codes: Codes) -> Reading:
    """As `diagnosis.read`: the likely cause of what is wrong with one weight."""
    name, W = sample.name, sample.base
    if not bool(sample.stored.isfinite().all()):
        return Reading(name, Cause.not_finite)
    D = W.new_zeros(W.shape) if sample.delta is None else sample.delta
    wrong = 1 - codes.share(W, D)
    if not wrong:
        return Reading(name, None)
    enough = min(_FEW, wrong / 10)
    if found := sorted(_explaining(sample, D, codes, enough), key=itemgetter(0)):
        best, *others = (reading for _, reading in found)
        return replace(best, also=tuple(others))
    if share := _merged_share(sample, codes):
        return Reading(name, Cause.partly, share)
    if wrong <= _FEW:
        return Reading(name, Cause.twice_rounded, detail="some of its codes are not the nearest")
    return _unexplained(sample, codes)


def _explaining(sample: Sample, D: Tensor, codes: Codes, enough: float) -> list[tuple[float, Reading]]:
    """(misses, reading) of all that leave few enough codes unexplained."""
    found = list[tuple[float, Reading]]()
    candidates: Iterable[_Candidate] = _candidates(sample, D, codes)
    for rounded in (_EXACT, *_NARROW):
        tried = list[tuple[float, _Candidate]]()
        for reading, base, delta in candidates:
            now = 1 - codes.share(*rounded(base, delta))
            tried.append((now, (reading, base, delta)))
            if now <= enough:
                found.append((now, replace(reading, detail=reading.detail or rounded.how)))
        if any(not now or reading.cause is not Cause.twice_rounded for now, reading in found):
            break
        candidates = [candidate for _, candidate in sorted(tried, key=itemgetter(0))[:_KEPT]]
    best = min(found, key=itemgetter(0), default=None)
    if best is None or (best[0] and best[1].cause is Cause.scale):
        near = (best[1].factor, abs(best[1].factor) / 2) if best else None
        now, fitted = _fitted(sample, codes, near)
        if now <= enough and (best is None or now < best[0]):
            found.append((now, fitted))
    return found


def _candidates(sample: Sample, D: Tensor, codes: Codes) -> Iterator[_Candidate]:
    """What may have been encoded: what is wrong then, base, and delta."""
    name, W = sample.name, sample.base
    yield Reading(name, Cause.twice_rounded), W, D
    if sample.delta is not None:
        yield Reading(name, Cause.not_merged, 0.0), W, 0 * D
        for factor, _ in known(sample.scaling):
            yield Reading(name, Cause.scale, factor), W, factor * D
        if D.shape[0] == D.shape[1]:
            yield Reading(name, Cause.mixed, detail="the delta was added transposed"), W, D.T
    coded = Reading(name, Cause.coded_form if sample.delta is None else Cause.coded_base)
    for form in sample.four_bit:
        values = form()
        yield replace(coded, detail=NF4), values, D
        yield replace(coded, detail=NF4), round_to(values, "BF16").double(), D
    yield replace(coded, detail=sample.dtype), codes.nearest(W), D


def _fitted(sample: Sample, codes: Codes, near: tuple[float, float] | None) -> tuple[float, Reading]:
    """(misses, reading): the factor of the delta that explains most codes; near a least-squares fit, or
    within `near`, (factor, reach).
    """
    nothing = 1.0, Reading(sample.name, Cause.unknown)
    if sample.delta is None or not bool(sample.delta.any()):
        return nothing
    W, D = sample.base, sample.delta
    energy = float((D * D).sum())
    fit = float(((sample.stored - W) * D).sum()) / energy
    middle, reach = near or (fit, max(_DEVIATIONS * sqrt(codes.noise / D.numel() / energy), SAME_FACTOR))
    if reach < _SHARP and min(abs(middle), abs(middle - 1)) <= reach:
        return nothing
    for rounded in (_EXACT, _SUM_IN_BF16):
        factor, width = middle, reach
        for _ in range(_ZOOMS):
            tried = [factor + width * (2 * n / _STEPS - 1) for n in range(_STEPS + 1)]
            missed = [1 - codes.share(*rounded(W, f * D)) for f in tried]
            factor = fmean(f for f, m in zip(tried, missed, strict=True) if m == min(missed))
            width *= 4 / _STEPS
            if min(missed) > _HOPELESS:
                break
        if min(missed) <= _FEW and min(abs(factor), abs(factor - 1)) > SAME_FACTOR:
            return min(missed), Reading(sample.name, Cause.scale, factor)
    return nothing


def _merged_share(sample: Sample, codes: Codes) -> float:
    """The share of rows that are base + delta where all others are the base's; else 0."""
    if sample.delta is None:
        return 0.0
    merged = codes.are(sample.base, sample.delta).all(1)
    left = codes.are(sample.base, 0 * sample.delta).all(1)
    return float(merged.double().mean()) if bool((merged | left).all() and (left & ~merged).any()) else 0.0


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
    if sample.apart:
        told, rest = weighted(sample)
        if rest <= _AS_NEAR * codes.noise and off > _FARTHER * rest:
            return Reading(sample.name, Cause.weights, detail=told)
    energy = float(sample.delta.square().sum())
    variance, excess = codes.noise * energy / W.numel(), sqrt(off / codes.noise) if codes.noise else inf
    fit = Fit(float(((O - W) * sample.delta).sum()), energy, variance, excess)
    cause = Cause.other_codes if off <= _LOOSE * codes.noise else Cause.other_base
    return Reading(sample.name, cause, size, fit=fit)
