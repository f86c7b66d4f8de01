"""What the merged weights must show, by the facts of their recomputation: gates, and findings in words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from math import fsum
from typing import Any

from pipeline.ground.outliers import alarms
from pipeline.ground.reference import Facts, interval
from pipeline.ground.report import Gate, Status
from pipeline.ground.units import show_ulps
from pipeline.merging.pieces import Merged
from pipeline.verification.recomputing import by_chance
from pipeline.weight import Output

_AS_NEAR = "half a unit and the slack of a float32 sum"
LEAST = 0.9  # of the delta: what is less fails unless a recipe allows it (spec, fidelity section 8)
_WHOLE = 0.99  # of the delta: what is less is told (spec, fidelity section 8)
_NAMED = 6  # experts, at most


def rounding(output: Output, facts: dict[str, Facts]) -> Gate:
    """Merged weights as near as their dtype or codes allow; a figure only where arithmetic is narrower."""
    if not facts:
        return Gate("rounding", Status.passed, "no weight is merged", "half a unit in the last place")
    beyond, elements = sum(f.beyond for f in facts.values()), sum(f.elements for f in facts.values())
    numbers = {name: f for name, f in facts.items() if not f.coded}
    coded = len(facts) - len(numbers)
    worst = max(numbers or facts, key=lambda name: (facts[name].worst_ulp, facts[name].beyond))
    seen = f"{elements:,} elements"
    if numbers:
        raw = max(f.worst_raw_ulp for f in numbers.values())
        beyond_slack = show_ulps(facts[worst].worst_ulp)
        seen = f"worst {beyond_slack} beyond the slack ({show_ulps(raw)} with it), {seen}"
    seen += f", codes of {coded} weights among them" if coded else ""
    if not {"float32", "float64"} & set(output.plan.merge_dtype.split(", ")):
        return Gate("rounding", Status.passed, seen, f"reported only: merged in {output.plan.merge_dtype}")
    wanted = _AS_NEAR + ("; the nearest codes, or those that the slack makes as near" if coded else "")
    if by_chance(output):
        wanted += "; a whole unit where it was rounded by chance"
    if beyond:
        worst = max(facts, key=lambda name: (facts[name].beyond > 0, facts[name].worst_ulp))
        seen += f"; {beyond} too far off, the worst in {worst}"
    noisy = [name for name, f in facts.items() if f.is_noisy and name not in by_chance(output)]
    if noisy:
        seen += f"; codes of {noisy[0]} are farther off in sum than they should be ({len(noisy)} weights)"
    return Gate("rounding", Status.failed if beyond or noisy else Status.passed, seen, wanted)


def effect(facts: Mapping[str, Facts]) -> Gate:
    """Every target changed, every expert of a stack too, and nothing is infinite or NaN, where looked at."""
    same = [name for name, f in facts.items() if f.energy and not f.changed]
    broken = [name for name, f in facts.items() if f.not_finite]
    idle = unchanged_experts(facts)
    seen = f"{len(facts) - len(same)} of {len(facts)} merged weights changed"
    seen += f", not {same[0]}" if same else ""
    seen += f"; {idle}" if idle else ""
    seen += f"; {broken[0]} is not finite" if broken else ""
    status = Status.failed if same or idle or broken else Status.passed
    return Gate("effect", status, seen, "all of them, all finite")


def unchanged_experts(facts: Mapping[str, Facts]) -> str:
    """Names those that are the base's though the nearest values are not; "" if there are none."""
    parts = {n: [e for e, p in f.parts.items() if p.due and not p.changed] for n, f in facts.items()}
    found = {name: experts for name, experts in parts.items() if experts}
    if not found:
        return ""
    name, experts = next(iter(found.items()))
    more = f" and of {len(found) - 1} other weights" if len(found) > 1 else ""
    return f"experts {_listed(experts)} of {name}{more} are the base's"


def retained(facts: Mapping[str, Facts], output: Output, least: float, most: float) -> tuple[Gate, list[str]]:
    """(gate, findings): how much of the deltas is stored; more than all of it is never rounding."""
    known = {name: f for name, f in facts.items() if f.energy}
    energy = fsum(f.energy for f in known.values())
    if not energy:
        return Gate("retained", Status.passed, "no delta", f">= {least:g}"), []
    share = fsum(f.kept for f in known.values()) / energy
    low, high = interval(share * energy, fsum(f.variance for f in known.values()), energy)
    over = {name: f.kept / f.energy for name, f in known.items() if _holds_more(f, most)}
    wanted = f">= {least:g}, of no weight more than {most:g}"
    seen, findings = f"{share:.4f} of the delta", []
    if over:
        name = max(over, key=lambda n: over[n])
        seen += f", {over[name]:.4g} times in {name} ({len(over)} weights): merged twice, or at another scale"
        return Gate("retained", Status.failed, seen, wanted), []
    if high < least:
        return Gate("retained", Status.failed, seen + _remedy(output), wanted), []
    if share < least:
        seen += f" (95 %: {low:.4f} to {high:.4f})"
    lost = f"only {100 * max(share, 0.0):.3g} % of the delta is kept" if high < LEAST else ""
    if weak := [name for name, f in known.items() if f.kept / f.energy < least]:
        findings.append(f"rounding kept less than {least:g} of the delta of {weak[0]} ({len(weak)} weights)")
    elif share < _WHOLE:
        findings.append(f"rounding kept {share:.4f} of the deltas, less than {_WHOLE:g}{_remedy(output)}")
    return Gate("retained", Status.passed, seen, wanted, lost), findings


def _holds_more(f: Facts, most: float) -> bool:
    """Whether all of the interval lies above `most`, and above what the nearest values would hold."""
    excess = f.retained_interval[0] - max(f.kept_at_best / f.energy, 1.0)
    return excess > most - 1


def _remedy(output: Output) -> str:
    """What would keep more of the deltas, as far as it is this run's to say."""
    if any(weight.codes for weight in output.plan.weights):
        return "; 16 bits keep it, verify.min_retained says with how little the run may pass"
    if not output.statistics:
        return ""
    return "; save.dtype=float16 or float32 rounds less, save.rounding=auto keeps it on average"


def noteworthy(facts: Mapping[str, Facts], output: Output) -> list[str]:
    """Findings: deltas that are zero, experts without one where siblings have it, values that stand out."""
    told = []
    if still := [name for name, f in facts.items() if not f.energy]:
        told.append(f"the delta of {still[0]} is zero ({len(still)} weights)")
    for name, f in facts.items():
        idle = [e for e, part in f.parts.items() if not part.energy]
        if idle and len(idle) < len(f.parts):
            told.append(
                f"the delta of experts {_listed(idle)} of {name} is zero, where {len(f.parts) - len(idle)} "
                "siblings have one: no token may have reached them"
            )
        lost = [e for e, part in f.parts.items() if part.energy and not part.due and not part.changed]
        if lost and len(lost) < len(f.parts):
            told.append(f"rounding swallows the delta of experts {_listed(lost)} of {name}")
    return [*told, *_without(output), *alarms(dict(facts))]


def _without(output: Output) -> list[str]:
    """Experts held one by one that the adapter leaves alone, where it changes others of the same layer."""
    alike: dict[str, dict[int, bool]] = defaultdict(dict)
    for weight in output.merged.weights:
        if found := re.fullmatch(r"(.*\bexperts\.)(\d+)(\..*)", weight.name):
            alike[f"{found[1]}#{found[3]}"][int(found[2])] = isinstance(weight, Merged)
    told = []
    for name, experts in alike.items():
        idle = sorted(e for e, changed in experts.items() if not changed)
        if idle and len(idle) < len(experts):
            told.append(
                f"experts {_listed(idle)} of {name} get no delta, {len(experts) - len(idle)} siblings do"
            )
    return told


def _listed(numbers: list[int]) -> str:
    """3, 7 and 12 more."""
    shown = ", ".join(map(str, numbers[:_NAMED]))
    return shown if len(numbers) <= _NAMED else f"{shown} and {len(numbers) - _NAMED} more"


def figures(facts: Mapping[str, Facts], weights: Mapping[str, Any], every: bool) -> dict[str, dict[str, Any]]:
    """For the report: what save measured, then what was seen here; spreads where they are better known."""
    found = {}
    for name, f in facts.items():
        spread = {"before": f.before.as_dict(), "after": f.after.as_dict()}
        known = weights.get(name, {})
        found[name] = {**known, **(spread if every or "before" not in known else {}), **f.as_dict()}
    return found
