"""What logits must show: limits by the width of the stored weights, judged by confidence intervals.

The ratio KL(adapter||merged) / KL(adapter||base) is judged first: an absolute divergence passes a merge that
lost half of a small adapter, and refuses a sound one of a model that amplifies rounding. So the absolute
limits refuse where a recipe sets them, and where the adapter does too little for a ratio; else what lies
beyond them is told. A limit fails only if the whole 95 % interval lies beyond it, the noise of the
evaluation itself taken away (limits: spec, fidelity section 8, after llama.cpp's tables).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod, sqrt
from typing import Any, NamedTuple

from pipeline.ground.report import Action, Gate, PlannedWeight, Status

REPORTED = "reported only: the output is quantized"
_FAINT = 1e-6  # nats of KL(adapter||base) per token, of the order that rounding to 16 bits costs
_ALL_LOST = 0.5  # the ratio beyond which most of the effect is gone, however faint


@dataclass(frozen=True, slots=True)
class Limits:
    """The least or most that is still right; None: not asked."""

    max_ratio: float | None = None
    max_kl: float | None = None
    max_kl_p999: float | None = None
    min_top1: float | None = None
    max_rms: float | None = None

    def over(self, other: Limits) -> Limits:
        """These, and the other's where nothing is set."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: value for name, value in own.items() if value is not None})


SIXTEEN = Limits(max_ratio=0.01, max_kl=1e-4, max_kl_p999=5e-3, min_top1=0.995, max_rms=0.003)
EIGHT = Limits(max_ratio=0.05, max_kl=5e-3, min_top1=0.97)
FOUR = Limits(max_ratio=0.5, max_kl=5e-2, min_top1=0.9)


def limits_of(weights: Sequence[PlannedWeight]) -> Limits:
    """The limits for an output, by the bytes that an element of its merged weights takes."""
    merged = [w for w in weights if w.action is Action.merged]
    elements = sum(prod(w.shape) for w in merged)
    width = sum(w.num_bytes for w in merged) / elements if elements else 2.0
    return SIXTEEN if width >= 1.9 else EIGHT if width >= 0.9 else FOUR


def judge(
    figures: Mapping[str, Any], usual: Limits, asked: Limits, text: str, reported: bool = False
) -> tuple[list[Gate], list[str]]:
    """(gates, findings) for figures of `divergence.compared`; `text` tells them in a line.

    `reported`: the ratio is told and refuses nothing.
    """
    if not figures["finite"]:
        return [Gate("logits", Status.failed, f"not finite: {text}", "finite numbers")], []
    limits = asked.over(usual)
    assert limits.max_ratio is not None
    effect, floor = figures["kl_adapter_base"], figures.get("kl_floor", 0.0)
    low = figures["ratio_interval"][0] - (floor / effect if effect else 0.0)
    findings: list[str] = []
    status = Status.passed if low <= limits.max_ratio or reported else Status.failed
    if status is Status.failed and effect < _FAINT and low < _ALL_LOST:
        status = Status.skipped
        findings.append(
            f"the adapter moves predictions on this text by {effect:.1g} nats only, about what rounding "
            "does: too little to judge the merge by"
        )
    faint = status is Status.skipped
    wanted = REPORTED if reported else f"ratio <= {limits.max_ratio:g}"
    passed = status is Status.passed
    lost = _lost(figures["ratio"]) if passed and low > (SIXTEEN.max_ratio or 0.0) else ""
    gates = [Gate("logits", status, text, wanted, lost)]
    for found in _absolute(figures, floor, limits):
        if found.holds:
            gates.append(Gate(found.name, Status.passed, found.seen, found.wanted))
        elif getattr(asked, found.setting) is not None or (faint and found.setting == "max_kl"):
            gates.append(Gate(found.name, Status.failed, found.seen, found.wanted))
        else:
            findings.append(f"{found.name}: {found.seen}, usually {found.wanted} for weights of this width")
    return gates, findings


def _lost(ratio: float) -> str:
    """What weights of 16 bits would be refused for."""
    told = f"(KL ratio {ratio:.3g})"
    if ratio >= 1:
        return f"nothing of the adapter's effect is left {told}"
    return f"{100 * ratio:.3g} % of the adapter's effect is lost {told}"


class _Found(NamedTuple):
    """One absolute limit: what was seen, and whether it holds."""

    name: str
    setting: str
    holds: bool
    seen: str
    wanted: str


def _absolute(figures: Mapping[str, Any], floor: float, limits: Limits) -> list[_Found]:
    """The limits that apply."""
    found = []
    for name, setting, key, interval, places in (
        ("divergence", "max_kl", "kl_mean", "kl_interval", ".2g"),
        ("tail", "max_kl_p999", "kl_p999", "kl_p999_interval", ".2g"),
        ("same token", "min_top1", "top1_agreement", "top1_interval", ".2%"),
        ("probabilities", "max_rms", "rms_probability", "rms_interval", ".2g"),
    ):
        limit, value = getattr(limits, setting), figures.get(key)
        if limit is None or value is None:
            continue
        low, high = figures[interval]
        least = setting.startswith("min")
        away = floor if key.startswith("kl") else 0.0
        holds = high >= limit if least else low - away <= limit
        seen = f"{value:{places}} (95 %: {low:{places}} to {high:{places}})"
        found.append(_Found(name, setting, holds, seen, f"{'>=' if least else '<='} {limit:g}"))
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson, 1927)."""
    z2 = 1.96 * 1.96
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)
