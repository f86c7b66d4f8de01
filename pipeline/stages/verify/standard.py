"""verify=standard: the files, samples of every merged weight in float64, and the model's answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.answering import Asked, answers, base_model, read_text
from pipeline.deferring import Layerwise
from pipeline.extraction.proving import Proof, extracted, proof
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.errors import Refused
from pipeline.ground.gates import Limits
from pipeline.ground.reference import Facts
from pipeline.ground.report import Gate, Report, Status
from pipeline.recomputing import converted, recompute, rounding
from pipeline.stage import Verify, stage
from pipeline.stages.verify.structure import effect, files, hashes, report
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Verify):
    """Files, weights and logits; a tier that fails skips the ones after it."""

    tokens: int = 512
    """tokens of text on which logits are compared; 0 leaves that out"""
    prompt: str | None = None
    """something that base, adapter and merged model each answer, for people to read"""
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
    min_retained: float = 0.9
    """least share of the deltas that survives rounding"""

    def check(self) -> None:
        check_device(self.device)
        if self.tokens < 0:
            raise Refused(f"verify.tokens: {self.tokens} is not a number of tokens; 0 compares no logits")
        if self.text is not None:
            read_text(self.text)

    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report:
        begun = time.monotonic()
        findings: list[str] = []
        proved = self._proof(output, adapter)
        if output.is_adapter:
            return extracted(output, proved, begun)
        weights = output.statistics_as_dicts()
        gates = files(output, base)
        if _all_passed(gates):
            gates.append(converted(output))
            facts = recompute(output, adapter)
            weights = {name: {**weights.get(name, {}), **f.as_dict()} for name, f in facts.items()}
            gates += self._judged(output, facts, weights, findings)
        outcome = None
        if _all_passed(gates):
            outcome = answers(output, base, adapter, self._asked(), gates, findings)
        gates += [*proved.gates, *hashes(output)]
        return report(
            output,
            gates,
            *findings,
            *proved.findings,
            extraction=proved.as_dict(),
            base=base,
            weights=weights,
            logits=outcome.figures if outcome else None,
            answers=outcome.answers if outcome else None,
            seconds=time.monotonic() - begun,
        )

    def _asked(self) -> Asked:
        limits = Limits(self.max_ratio, self.max_kl, self.max_kl_p999, self.min_top1, self.max_rms)
        return Asked(
            self.tokens, self.text, self.prompt, limits, self.device, self.memory_limit, self.layerwise
        )

    def _proof(self, output: Output, adapter: Adapter) -> Proof:
        """What is asked of an adapter that this run has extracted."""
        device = resolve_device(self.device)
        return proof(output, adapter, self.tokens, device, self.memory_limit, base_model)

    def _judged(
        self, output: Output, facts: dict[str, Facts], weights: dict[str, dict[str, Any]], findings: list[str]
    ) -> list[Gate]:
        gates = [rounding(output, facts)]
        if output.statistics:
            gates.append(effect(weights))
        else:
            gates.append(_sampled_effect(facts))
        if still := [name for name, f in facts.items() if not f.energy]:
            findings.append(f"the delta of {still[0]} is zero ({len(still)} weights)")
        energy = sum(f.energy for f in facts.values())
        retained = sum(f.kept for f in facts.values()) / energy if energy else 1.0
        status = Status.passed if retained >= self.min_retained else Status.failed
        hint = "" if status is Status.passed else _hint(output)
        gates.append(
            Gate("retained", status, f"{retained:.4f} of the delta{hint}", f">= {self.min_retained:g}")
        )
        weak = [n for n, f in facts.items() if f.energy and f.kept / f.energy < self.min_retained]
        if weak and status is Status.passed:
            findings.append(
                f"rounding kept less than {self.min_retained:g} of the delta of {weak[0]} "
                f"({len(weak)} weights)"
            )
        return gates


def _all_passed(gates: list[Gate]) -> bool:
    return all(gate.status is not Status.failed for gate in gates)


def _sampled_effect(facts: dict[str, Facts]) -> Gate:
    same = [name for name, f in facts.items() if f.energy and not f.changed]
    broken = [name for name, f in facts.items() if f.not_finite]
    seen = f"{len(facts) - len(same)} of {len(facts)} merged weights changed"
    seen += f", not {same[0]}" if same else ""
    seen += f"; {broken[0]} is not finite" if broken else ""
    return Gate("effect", Status.failed if same or broken else Status.passed, seen, "all of them, all finite")


def _hint(output: Output) -> str:
    """What would keep more of the deltas."""
    if any(weight.codes for weight in output.plan.weights):
        return "; 16 bits keep it, verify.min_retained says with how little the run may pass"
    return "; save.dtype=float16 or float32 rounds less, save.rounding=auto keeps it on average"
