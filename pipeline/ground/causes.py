"""What is wrong with a merge, in words: the readings of its weights (diagnosis.py) told together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum, sqrt
from typing import NamedTuple

from pipeline.ground.diagnosis import NF4, Cause, Reading, Sample, read
from pipeline.ground.diagnosis_of_codes import read_codes
from pipeline.ground.factors import SAME_FACTOR, reasons
from pipeline.ground.swapped import glimpse, swapped

_PERHAPS_ANOTHERS = (Cause.other_base, Cause.other_codes, Cause.mixed, Cause.permuted)
_SURE = 0.1  # of the delta: what a scale that is taken from a weight may be off by


def look(sample: Sample) -> Reading:
    """The likely cause of what is wrong with one weight, by itself."""
    found = read_codes(sample, sample.codes) if sample.codes else read(sample)
    merged = sample.delta is not None
    kept = glimpse(sample) if merged and found.cause in _PERHAPS_ANOTHERS else None
    return replace(found, merged=merged, scaling=sample.scaling, sample=kept)


def causes(looks: Sequence[Reading]) -> list[tuple[Cause, str]]:
    """What is wrong, told once for all weights that share it; the gravest first."""
    readings = _of_one_mind(_agreed(_exchanged(looks)))
    merged, others = ([r for r in readings if r.merged is kind] for kind in (True, False))
    found: list[tuple[Cause, str]] = []
    for cause in Cause:
        some = [r for r in readings if r.cause is cause]
        if not some:
            continue
        if cause is Cause.touched:
            if any(r.cause is Cause.other_base for r in merged):
                continue
            found.append((cause, _touched(some, others)))
        elif cause is Cause.other_base:
            found.append(_other_base(some, merged, others))
        elif cause is Cause.other_codes:
            found.append((cause, _other_codes(some, merged)))
        elif cause is Cause.scale:
            found += _scales(some, merged)
        elif told := [r for r in some if r in merged]:
            found.append((cause, _plain(cause, told, merged, _share(told, merged))))
        else:
            found.append((cause, _plain(cause, some, others, _share(some, others, "untouched"))))
    return found


def _exchanged(readings: Sequence[Reading]) -> list[Reading]:
    """The readings, those explained by another weight's delta put so."""
    alike: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    for sample in (r.sample for r in readings if r.sample):
        alike.setdefault((re.sub(r"\d+", "#", sample.name), tuple(sample.base.shape)), []).append(sample)
    whose = {name: other for group in alike.values() for name, other in swapped(group).items()}
    return [
        replace(r, cause=Cause.swapped, detail=whose[r.name], fit=None) if r.name in whose else r
        for r in readings
    ]


def _agreed(readings: Sequence[Reading]) -> list[Reading]:
    """The readings; those too coarse to speak against the scale that most weights have are put with it."""
    fitted = [r for r in readings if r.uncertain]
    sure = sorted((r for r in fitted if r.uncertain <= _SURE * abs(r.factor)), key=lambda r: r.factor)
    if not sure or sure[len(sure) // 2].cause is not Cause.scale:
        return list(readings)
    common = sure[len(sure) // 2].factor
    near = {r.name for r in fitted if abs(r.factor - common) <= max(r.uncertain, SAME_FACTOR * abs(common))}
    if len(near) < len(fitted) / 2:
        return list(readings)
    return [
        replace(r, cause=Cause.scale, factor=common, detail="", uncertain=0.0) if r.name in near else r
        for r in readings
    ]


def _of_one_mind(readings: Sequence[Reading]) -> list[Reading]:
    """The readings; codes that several things explain, or nothing, are told as most of them are."""
    votes = Counter(_told(r) for r in readings)
    readings = [_most_told(r, votes) for r in readings]
    unexplained = [r for r in readings if r.fit and r.fit.excess]
    near = sum(r.cause is Cause.other_codes for r in unexplained)
    cause = Cause.other_codes if 2 * near > len(unexplained) else Cause.other_base
    return [replace(r, cause=cause) if r.fit and r.fit.excess else r for r in readings]


def _most_told(reading: Reading, votes: Mapping[tuple[Cause | None, str, str], int]) -> Reading:
    most = max((reading, *reading.also), key=lambda one: votes[_told(one)])
    return replace(most, merged=reading.merged, scaling=reading.scaling)


def _told(reading: Reading) -> tuple[Cause | None, str, str]:
    return reading.cause, f"{reading.factor:.3g}", reading.detail


def _share(some: Sequence[Reading], of: Sequence[Reading], kind: str = "merged") -> str:
    """ "all 14 merged weights", "7 of 14 merged weights, as x"."""
    if len(some) == len(of):
        return f"all {len(of)} {kind} weights" if len(of) > 1 else some[0].name
    return f"{len(some)} of {len(of)} {kind} weights, {'as ' * (len(some) > 1)}{some[0].name}"


def _plain(cause: Cause, some: list[Reading], of: list[Reading], where: str) -> str:
    if cause is Cause.not_merged:
        trained = [r.name for r in some if any(part in r.name for part in ("embed", "lm_head", "wte"))]
        if trained and len(trained) == len(some):
            return (
                f"what the adapter trained of {' and '.join(trained)} is lost: the base's values stand there"
            )
        if len(some) == len(of):
            return "the adapter was not merged: every weight is the base's"
        return f"the adapter was not merged into {where}: the base's values stand there"
    if cause is Cause.swapped:
        kind = "experts are" if "expert" in some[0].name else "weights are"
        return f"{where}: {kind} scrambled: {some[0].name} got what belongs to {some[0].detail}"
    detail = Counter(r.detail for r in some).most_common(1)[0][0]
    return {
        Cause.not_finite: f"{where}: holds infinite or NaN values; float16 overflows above 65504",
        Cause.quantized: f"{where}: has only sixteen values in a block: quantized to 4 bits after the merge",
        Cause.coded_base: f"{where}: the adapter was added to the base's {detail} form, not to this base; "
        "if that was meant, give the quantized checkpoint as base_model"
        + (", or dequantize=simulate" if detail == NF4 else ""),
        Cause.coded_form: f"{where}: holds the base's {detail} form, not this base's values",
        Cause.weights: f"{where}: the adapters were added by other weights than the recipe's, or not all of "
        f"them: of what it adds, this holds {detail}",
        Cause.permuted: f"{where}: {detail}, as in another format (rope's order of q and k, experts)",
        Cause.partly: f"{where}: the adapter was merged into a part only: {_range(some, 100)} % of the "
        "values are base + delta, the others the base's; a shard or a part of a packed weight was left out",
        Cause.mixed: f"{where}: the delta is scrambled: {detail}",
        Cause.twice_rounded: f"{where}: rounded more than once" + (f": {detail}" if detail else ""),
    }.get(cause, f"{where}: differs from base + delta in a way that no known cause explains")


def _touched(some: list[Reading], others: list[Reading]) -> str:
    share = f"{len(some)} of {len(others)} weights that the adapter does not touch differ from the base's"
    return f"{share}, as {some[0].name} by {some[0].factor:.2g} of its size: trained on, or of another base"


def _other_base(some: list[Reading], merged: list[Reading], others: list[Reading]) -> tuple[Cause, str]:
    size = sorted(r.factor for r in some)[len(some) // 2]
    off = [r for r in others if r.cause is Cause.touched]
    left = "what is left when the delta is taken away differs from this base by "
    left += f"{size:.2g} of its size in {_share(some, merged)}"
    held, most = _held(some), len(some) > len(merged) / 2
    times = (
        ""
        if held.is_whole
        else f"; it holds {round(held.times, 2) + 0.0:.2f} (+- {held.error:.2f}) times the delta"
    )
    if most and others and not off:
        told = "another adapter was merged, or this one into another form of the base, quantized perhaps"
        if held.is_whole:
            told = "the adapter was merged into another form of the base: a quantized one, or, if base_model "
            told += "is quantized, what that was made from"
        elif held.is_nothing:
            told = "another adapter was merged, or none, and that into another form of the base"
        untouched = f"though all {len(others)} weights that no delta touches are this base's"
        return Cause.other_base, f"{told}: {left}, {untouched}{times}"
    if most or (off and len(off) > len(others) / 2):
        told = "the adapter was added to another base"
        if held.is_nothing:
            told = "this is another base, and the adapter is not in it; another one may be"
        also = f", and so do {len(off)} of {len(others)} weights that no delta touches" if off else ""
        return Cause.other_base, f"{told}: {left}{also}{times}"
    return Cause.unknown, _plain(Cause.unknown, some, merged, _share(some, merged))


class _Held(NamedTuple):
    """How many times the delta is in weights that are off by something else too, and two deviations of it."""

    times: float
    error: float

    def may_be(self, times: float) -> bool:
        return abs(self.times - times) <= max(self.error, _SURE)

    @property
    def is_whole(self) -> bool:
        return self.may_be(1) and not self.may_be(0)

    @property
    def is_nothing(self) -> bool:
        return self.may_be(0) and not self.may_be(1)


def _held(some: list[Reading]) -> _Held:
    fits = [r.fit for r in some if r.fit]
    energy = fsum(fit.energy for fit in fits) or 1.0
    return _Held(fsum(fit.kept for fit in fits) / energy, 2 * sqrt(fsum(f.variance for f in fits)) / energy)


def _other_codes(some: list[Reading], merged: list[Reading]) -> str:
    held, fits = _held(some), [r.fit for r in some if r.fit]
    excess = sorted(fit.excess for fit in fits)[len(fits) // 2]
    told = (
        "quantized by another rule, calibrated perhaps, merged in narrower arithmetic, or into another base"
    )
    if held.is_nothing:
        told = "another adapter was merged, or none, and it was quantized by another rule or of another base"
    elif held.may_be(0):
        told += ", or another adapter"
    return (
        f"{_share(some, merged)}: neither the codes nearest to base + delta nor those of a known mistake, "
        f"{excess:.2f} times as far off, holding {held.times:.2f} (+- {held.error:.2f}) times the delta: "
        + told
    )


def _scales(some: list[Reading], merged: list[Reading]) -> list[tuple[Cause, str]]:
    """One sentence for each explanation of a factor: of several, that which most weights share."""
    why = {r.name: reasons(r.factor, r.scaling) for r in some}
    votes = Counter(words for several in why.values() for words in several)
    told: dict[str, list[Reading]] = {}
    for reading in some:
        most = max(votes[words] for words in why[reading.name])
        likely = " or ".join(words for words in why[reading.name] if votes[words] == most)
        told.setdefault(likely, []).append(reading)
    return [
        (Cause.scale, f"{_share(group, merged)}: holds {_range(group)} times the delta: {words}")
        for words, group in told.items()
    ]


def _range(group: Sequence[Reading], of: float = 1.0) -> str:
    """The factor that they have, or the least and the most, times `of`."""
    factors = sorted(of * r.factor for r in group)
    low, middle, high = factors[0], factors[len(factors) // 2], factors[-1]
    if high - low <= 2 * max(SAME_FACTOR * abs(middle), *(of * r.uncertain for r in group)):
        return f"{middle:.3g}"
    return f"{low:.3g} to {high:.3g}"
