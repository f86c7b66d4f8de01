"""What is wrong with a merge, in words: the readings of its weights (diagnosis.py) told together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, sqrt

from pipeline.ground.diagnosis import SAME_FACTOR, Cause, Reading, Sample, Scaling, read, swapped

_SURE = 0.1  # relative uncertainty of a scale that is taken from a weight


def causes(samples: Iterable[Sample]) -> list[tuple[Cause, str]]:
    """What is wrong, told once for all weights that share it; the gravest first."""
    taken = list(samples)
    readings = _agreed(_exchanged(taken, [read(sample) for sample in taken]))
    merged = [r for r, s in zip(readings, taken, strict=True) if s.delta is not None]
    others = [r for r, s in zip(readings, taken, strict=True) if s.delta is None]
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
        elif cause is Cause.scale:
            found += _scales(some, merged, {s.name: s.scaling for s in taken})
        else:
            found.append((cause, _plain(cause, some, merged if some[0] in merged else others)))
    return found


def _exchanged(samples: Sequence[Sample], readings: Sequence[Reading]) -> list[Reading]:
    """The readings, those explained by another weight's delta put so."""
    alike: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    for sample, reading in zip(samples, readings, strict=True):
        if sample.delta is not None and reading.cause in (Cause.other_base, Cause.mixed, Cause.permuted):
            alike.setdefault((re.sub(r"\d+", "#", sample.name), tuple(sample.base.shape)), []).append(sample)
    whose = {name: other for group in alike.values() for name, other in swapped(group).items()}
    return [Reading(r.name, Cause.swapped, detail=whose[r.name]) if r.name in whose else r for r in readings]


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
    return [Reading(r.name, Cause.scale, common) if r.name in near else r for r in readings]


def _share(some: Sequence[Reading], of: Sequence[Reading]) -> str:
    """ "all 14 merged weights", "7 of 14 merged weights, as x"."""
    if len(some) == len(of):
        return f"all {len(of)} merged weights" if len(of) > 1 else some[0].name
    return f"{len(some)} of {len(of)} merged weights, as {some[0].name}"


def _plain(cause: Cause, some: list[Reading], of: list[Reading]) -> str:
    where = _share(some, of)
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
        Cause.four_bit_base: f"{where}: the adapter was added to the base's 4-bit (NF4) form, not to this "
        "base; give the quantized checkpoint as base_model if that was meant",
        Cause.permuted: f"{where}: {detail}, as in another format (rope's order of q and k, experts)",
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
    if len(some) > len(merged) / 2 and others and not off:
        return Cause.other_base, (
            "another adapter was merged, or this one into another form of the base, quantized perhaps: "
            f"{left}, though all {len(others)} weights that no delta touches are this base's"
        )
    if len(some) > len(merged) / 2 or (off and len(off) > len(others) / 2):
        also = f", and so do {len(off)} of {len(others)} weights that no delta touches" if off else ""
        return Cause.other_base, f"the adapter was added to another base: {left}{also}"
    return Cause.unknown, _plain(Cause.unknown, some, merged)


def _scales(
    some: list[Reading], merged: list[Reading], scalings: Mapping[str, Scaling | None]
) -> list[tuple[Cause, str]]:
    """One sentence for each explanation of a factor, or for each factor that nothing explains."""
    told: dict[str, list[Reading]] = {}
    for reading in some:
        told.setdefault(why(reading.factor, scalings.get(reading.name)), []).append(reading)
    return [
        (
            Cause.scale,
            f"{_share(group, merged)}: holds {_middle(group):.3g} times the delta: {words}",
        )
        for words, group in told.items()
    ]


def _middle(group: list[Reading]) -> float:
    return sorted(r.factor for r in group)[len(group) // 2]


def why(factor: float, scaling: Scaling | None) -> str:
    """What makes a delta this many times what it should be; several things where they come to the same."""
    known: list[tuple[float, str]] = [
        (float(n), f"merged {w}") for n, w in ((2, "twice"), (3, "three times"))
    ]
    known.append((-1.0, "subtracted instead of added"))
    if scaling:
        right, root = scaling.scale, sqrt(scaling.rank)
        plain_alpha, plain_rank = scaling.default_alpha, scaling.default_rank
        known += [
            (1 / right, "the scale was left out (alpha forgotten): B @ A was added as it is"),
            (1 / scaling.alpha, "alpha was taken for 1"),
            (root if scaling.stabilised else scaling.rank, "alpha was not divided by the rank"),
            (1 / root, "scaled by alpha / rank, but the adapter says rslora, alpha / sqrt(rank)")
            if scaling.stabilised
            else (
                root,
                "scaled by alpha / sqrt(rank), as for rslora, but the adapter is plain, alpha / rank",
            ),
            (plain_alpha / scaling.alpha, "alpha_pattern was left out"),
            (scaling.rank / plain_rank, "rank_pattern was left out of the scale"),
        ]
        if not scaling.stabilised:
            known.append((1 / root, "its scale is too small by sqrt(rank)"))
    matching = [
        words
        for value, words in known
        if isfinite(value) and abs(value - 1) > SAME_FACTOR and abs(factor / value - 1) <= SAME_FACTOR
    ]
    return " or ".join(dict.fromkeys(matching)) or "a scale or weight that the recipe does not name"
