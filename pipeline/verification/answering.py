"""The model's answers: base + unmerged adapter against the merged folder, where both can be run here."""

from __future__ import annotations

from pathlib import Path

from pipeline.ground import logits
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.gates import REPORTED, judge, limits_of
from pipeline.ground.identity import digest, files_in
from pipeline.ground.merge_logits import Merge, as_text
from pipeline.ground.peft_faults import fault
from pipeline.ground.report import Gate, Status
from pipeline.merging.combined import Combined
from pipeline.merging.pieces import Merged
from pipeline.verification.base_as_model import of_base
from pipeline.verification.comparing import (
    Asked,
    Loaders,
    Skipped,
    compared,
    num_classes,
    num_parameters,
    num_trained,
)
from pipeline.weight import Adapter, Checkpoint, Output, Weight


def answers(
    output: Output,
    base: Checkpoint[Weight],
    adapter: Adapter,
    asked: Asked,
    gates: list[Gate],
    findings: list[str],
) -> logits.Outcome | None:
    """Runs the models and adds gates and findings; None where nothing could be compared."""
    if not asked.tokens:
        return None
    usual = limits_of(output.plan.weights)
    coded = any(weight.codes for weight in output.plan.weights)
    reported = coded and asked.limits.max_ratio is None  # `retained` judges what codes lose
    wanted = REPORTED if reported else f"ratio <= {asked.limits.over(usual).max_ratio:g}"
    try:
        outcome = _compared(output, base, adapter, asked)
    except Skipped as reason:
        findings.append(f"logits were not compared{reason.finding}")
        gates.append(Gate("logits", Status.skipped, reason.seen, wanted))
        return None
    except logits.CannotCompare as reason:
        findings.append(f"logits were not compared, because base and adapter do not load: {reason}")
        gates.append(Gate("logits", Status.skipped, "base and adapter do not load", wanted))
        return None
    except logits.MergedDoesNotRun as reason:
        gates.append(Gate("logits", Status.failed, f"the merged model does not run ({reason})", wanted))
        return None
    judged, told = judge(outcome.figures, usual, asked.limits, as_text(outcome.figures), reported)
    gates += judged
    findings += [*outcome.assumed, *told]
    return outcome


def _compared(output: Output, base: Checkpoint[Weight], adapter: Adapter, asked: Asked) -> logits.Outcome:
    """Runs the models; Skipped where there is no reference, or no memory."""
    adapters = _reference(output, adapter)

    def reference() -> str | None:
        held = [(files_in(folder), factor) for folder, factor in adapters]
        return digest(of_base(base, output.merged), held)

    def models(loaders: Loaders) -> Merge:
        unmerged, merged = loaders.base(base, output.merged), loaders.folder(output)
        return Merge(output.folder, adapters, unmerged, merged, reference)

    largest = max(num_parameters(base.weights) + num_trained(adapter), output.plan.num_parameters)
    vocabulary = max(num_classes(base.weights), num_classes(output.merged.weights))
    return compared(models, largest, vocabulary, asked, asked.prompts)


def _reference(output: Output, adapter: Adapter) -> list[tuple[Path, float]]:
    """The adapters that base + unmerged adapter is made of; Skipped where there is no such reference."""
    if methods := {w.combination.method for w in output.merged.weights if isinstance(w, Combined)}:
        raise Skipped(
            "no reference for the combination",
            f": base and adapters do not add up to what {min(methods)} merges",
        )
    if faults := list(filter(None, (fault(p.config, p.deltas) for p in adapter.parts))):
        raise Skipped("no reference", f", because PEFT {faults[0]}")
    adapters = _adapters(adapter, output.merged)
    if any(f != 1 for _, f in adapters) and not all(isinstance(d, Lora) for d in adapter.deltas):
        raise Skipped("no reference for the weight", ": PEFT gives a weight to LoRA only")
    return adapters


def _adapters(adapter: Adapter, merged: Checkpoint[Weight]) -> list[tuple[Path, float]]:
    """Each adapter's folder with the factor that it was merged with."""
    factors = {p.part: p.factor for w in merged.weights if isinstance(w, Merged) for p in w.placed}
    return [(part.origin.folder, factors.get(n, 1.0)) for n, part in enumerate(adapter.parts)]
