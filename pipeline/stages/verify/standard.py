"""verify=standard: the files, samples of every merged weight in float64, and the model's answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.extraction.proving import extracted, proof
from pipeline.ground.device import check_device
from pipeline.ground.errors import Refused
from pipeline.ground.gates import Limits
from pipeline.ground.reference import Facts
from pipeline.ground.report import Gate, Report, Status
from pipeline.stage import Verify, stage
from pipeline.stages.verify.structure import effect as effect_of_all
from pipeline.stages.verify.structure import files, hashes, report
from pipeline.verification.answering import answers
from pipeline.verification.comparing import Asked, Layerwise, read_prompts, read_text
from pipeline.verification.judging import (
    LEAST,
    effect,
    figures,
    noteworthy,
    retained,
    rounding,
    unchanged_experts,
)
from pipeline.verification.recomputing import Watching, converted, recompute
from pipeline.verification.tiers import Seen, Tier, climb
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Verify):
    """Files, weights and logits; a tier that fails skips the ones after it."""

    tokens: int = 512
    """tokens of text on which logits are compared; 0 leaves that out"""
    prompts: Any = None
    """something, or a list of things, that base, adapter and merged model each answer, for people to read"""
    text: str | None = None
    """file of text on which logits are compared; default: a bundled page"""
    layerwise: Layerwise = Layerwise.auto
    """run models one layer at a time: auto, where they do not fit into memory; always; never"""
    max_ratio: float | None = None
    """largest KL(adapter||merged) / KL(adapter||base); default 0.01, fp8 0.05, 4-bit 0.5"""
    max_kl: float | None = None
    """largest mean KL(adapter||merged), nats; usually 1e-4, fp8 5e-3, 4-bit 5e-2; refuses only if set"""
    max_kl_p999: float | None = None
    """largest 99.9th percentile of it, nats; usually 5e-3 for 16 bits; refuses only if set"""
    min_top1: float | None = None
    """least share of same top tokens; usually 0.995, fp8 0.97, 4-bit 0.9; refuses only if set"""
    max_rms: float | None = None
    """largest RMS change of a token's probability; usually 0.003 for 16 bits; refuses only if set"""
    min_retained: float = LEAST
    """least share of the deltas that survives rounding"""
    max_retained: float = 1.1
    """most of its delta that any weight may hold: 2 is a delta that was added twice"""

    def check(self) -> None:
        check_device(self.device)
        if self.tokens < 0:
            raise Refused(f"verify.tokens: {self.tokens} is not a number of tokens; 0 compares no logits")
        for name in ("max_ratio", "max_kl", "max_kl_p999", "max_rms"):
            at_least_0(name, getattr(self, name))
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise Refused(f"verify.min_top1: {self.min_top1:g} is not a share; write 0.995 for 99.5 %")
        if self.text is not None:
            read_text(self.text)
        read_prompts(self.prompts)

    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report:
        begun = time.monotonic()
        if output.is_adapter:
            return extracted(output, proof(output, adapter, self.asked()), begun)
        seen = climb(self.tiers(), Seen(output, base, adapter, weights=output.statistics_as_dicts()))
        proved = proof(output, adapter, self.asked())
        return report(
            output,
            [*seen.gates, *proved.gates, *hashes(output)],
            *seen.findings,
            *proved.findings,
            extraction=proved.as_dict(),
            base=base,
            weights=seen.weights,
            logits=seen.outcome.figures if seen.outcome else None,
            answers=seen.outcome.answers if seen.outcome else None,
            seconds=time.monotonic() - begun,
        )

    def tiers(self) -> Sequence[Tier]:
        """What is looked at, in this order."""
        return (look_at_files, self.look_at_weights, self.ask)

    def look_at_weights(self, seen: Seen, every: bool = False, watching: Watching | None = None) -> None:
        """Samples, or every row, of what was computed, against float64."""
        output = seen.output
        seen.gates.append(converted(output, every))
        traced, facts = recompute(output, seen.base, seen.adapter, every, watching)
        seen.weights = figures(facts, seen.weights, every)
        gate, findings = retained(facts, output, self.min_retained, self.max_retained)
        seen.gates += [traced, rounding(output, facts), self._effect(seen, facts), gate]
        seen.findings += [*noteworthy(facts, output), *findings]

    def ask(self, seen: Seen) -> None:
        """What the models predict and say."""
        seen.outcome = answers(seen.output, seen.base, seen.adapter, self.asked(), seen.gates, seen.findings)

    def asked(self) -> Asked:
        """What of it the settings ask."""
        limits = Limits(self.max_ratio, self.max_kl, self.max_kl_p999, self.min_top1, self.max_rms)
        prompts = read_prompts(self.prompts)
        return Asked(self.tokens, self.text, prompts, limits, self.device, self.memory_limit, self.layerwise)

    def _effect(self, seen: Seen, facts: dict[str, Facts]) -> Gate:
        """By what save counted of all elements, if it did; experts by what was looked at."""
        if not seen.output.statistics:
            return effect(facts)
        gate = effect_of_all(seen.weights)
        if idle := unchanged_experts(facts):
            return replace(gate, status=Status.failed, seen=f"{gate.seen}; {idle}")
        return gate


def at_least_0(name: str, limit: float | None) -> None:
    """Refused for a largest distance that none can keep."""
    if limit is not None and not limit >= 0:
        raise Refused(f"verify.{name}: {limit:g} is not a number of at least 0")


def look_at_files(seen: Seen) -> None:
    """Names, shapes, dtypes, the bytes of what is untouched."""
    seen.gates += files(seen.output, seen.base)
