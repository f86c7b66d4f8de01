"""What survives of the deltas, in words: under codes, by chance, on a base that went through four bits."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from pipeline.ground.metrics import Statistics


def survival(statistics: Mapping[str, Statistics]) -> list[str]:
    """Sentences for the report; none for weights that are plain numbers, rounded to nearest."""
    told = []
    noise = {name: s.noise for name, s in statistics.items() if s.noise is not None}
    if noise:
        kept = [s.retained for name, s in statistics.items() if name in noise and s.retained is not None]
        shares = f"; of the deltas {median(kept):.3f} is kept, at least {min(kept):.3f}" if kept else ""
        told.append(
            f"codes are off by {median(noise.values()):.3g} times the delta (median of {len(noise)} weights, "
            f"{_most(noise)}){shares}"
        )
    if chance := [name for name, s in statistics.items() if s.rounding != "nearest"]:
        told.append(f"{len(chance)} of {len(statistics)} merged weights are rounded by chance")
    shifts = {name: s.base_shift for name, s in statistics.items() if s.base_shift is not None}
    if shifts:
        told.append(
            f"the 16-bit weights are {median(shifts.values()):.3g} times the delta away from what four bits "
            f"make of them (median of {len(shifts)} weights, {_most(shifts)}): so much depends on the base"
        )
    return told


def _most(facts: Mapping[str, float]) -> str:
    name = max(facts, key=lambda name: facts[name])
    return f"{facts[name]:.3g} in {name}"
