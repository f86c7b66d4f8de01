"""verify=thorough: every row of every merged weight, its layers on probes, and twenty times the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.ground.errors import Refused
from pipeline.stage import stage
from pipeline.stages.verify.standard import Standard, at_least_0, look_at_files
from pipeline.verification.comparing import Asked
from pipeline.verification.probing import Probing
from pipeline.verification.tiers import Seen, Tier

PROMPTS = ("What is photosynthesis?", "Write a short letter to a friend.", "def fibonacci(n):")


@stage("thorough")
@dataclass(frozen=True, kw_only=True)
class Thorough(Standard):
    """As standard, but every row of every weight, layers on probes, 10,240 tokens and several prompts."""

    tokens: int = 10_240
    """tokens of text on which logits are compared; 0 leaves that out"""
    probes: int = 16
    """random inputs of each merged weight, and as many along the rows of its A; 0 leaves them out"""
    max_outerr: float | None = None
    """largest ||E x|| / ||D x|| along A; default: 0.05, or 1.5 of what one rounding costs; codes are told"""

    def check(self) -> None:
        super().check()
        at_least_0("max_outerr", self.max_outerr)
        if self.probes < 0 or self.probes == 1:
            raise Refused(f"verify.probes: {self.probes} is too few for an interval; 0 leaves them out")

    def tiers(self) -> Sequence[Tier]:
        return (look_at_files, self.look_at_every_row, self.look_at_layers, self.ask)

    def look_at_every_row(self, seen: Seen) -> None:
        """Every row against float64, and what the layers make of probes while the rows stream past."""
        seen.probing = Probing(seen.output, self.probes) if self.probes else None
        self.look_at_weights(seen, True, seen.probing.of if seen.probing else None)

    def look_at_layers(self, seen: Seen) -> None:
        """What they made of the probes."""
        if seen.probing is None:
            return
        gate, findings = seen.probing.judge(self.max_outerr)
        seen.gates.append(gate)
        seen.findings += findings
        for name, outputs in seen.probing.as_dicts().items():
            seen.weights[name].update(outputs)

    def asked(self) -> Asked:
        own = super().asked()
        return own if self.prompts is not None else replace(own, prompts=PROMPTS)
