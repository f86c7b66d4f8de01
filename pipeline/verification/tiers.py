"""Verification climbs from tier to tier, files, weights, layers, answers; a failed one skips the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.ground.logits import Outcome
from pipeline.ground.report import Gate, Status
from pipeline.verification.probing import Probing
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@dataclass
class Seen:
    """What is verified, and what the tiers have found of it so far."""

    output: Output
    base: Checkpoint[Weight]
    adapter: Adapter
    gates: list[Gate] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)  # figures for the report
    probing: Probing | None = None
    outcome: Outcome | None = None

    @property
    def failed(self) -> bool:
        return any(gate.status is Status.failed for gate in self.gates)


Tier = Callable[[Seen], None]  # adds its gates, findings and figures


def climb(tiers: Sequence[Tier], seen: Seen) -> Seen:
    """What the tiers saw, in their order, up to the first that failed."""
    for tier in tiers:
        if seen.failed:
            break
        tier(seen)
    return seen
