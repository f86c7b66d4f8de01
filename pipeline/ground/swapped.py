"""Weights of one shape that got what belongs to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.ground.diagnosis import ALIKE, Sample

_MOST_ALIKE = 512  # weights of one shape that are held against each other
_SAME = 0.999  # cosine of values that are the same up to rounding
_CODES = 0.99  # of the codes: these values are in them
_GLANCE = 4096  # elements of each


def glimpse(sample: Sample) -> Sample:
    """As much of a sample as is needed to tell it from others; all of one that is held as codes."""
    if sample.codes or sample.delta is None:
        return sample
    rows = -(-_GLANCE // sample.base.shape[1])
    base, delta, stored = (t[:rows].clone() for t in (sample.base, sample.delta, sample.stored))
    return replace(sample, base=base, delta=delta, stored=stored)


def swapped(samples: Sequence[Sample]) -> dict[str, str]:
    """Of weights of one shape, experts or layers: whose delta or whose values each got instead of its own."""
    import torch

    taken = [(s, s.delta) for s in samples if s.delta is not None][:_MOST_ALIKE]
    if len(taken) < 2:
        return {}
    deltas, moved, targets, stored = (
        torch.stack([t.flatten()[:_GLANCE] for t in ts])
        for ts in (
            [D for _, D in taken],
            [s.stored - s.base for s, _ in taken],
            [s.base + D for s, D in taken],
            [s.stored for s, _ in taken],
        )
    )
    found: dict[str, str] = {}
    for ours, theirs, enough in ((moved, deltas, ALIKE), (stored, targets, _SAME)):
        rows, others = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (ours, theirs))
        best = (rows @ others.T).max(1)
        for n, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            (sample, _), (other, D) = taken[n], taken[index]
            base = sample.base if ours is moved else other.base
            if index != n and (sample.codes.share(base, D) > _CODES if sample.codes else value > enough):
                found.setdefault(sample.name, other.name)
    return found
