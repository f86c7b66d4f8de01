"""What verification asks of an extracted adapter: that PEFT takes it, what it holds, how near it answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.extraction import outputs
from pipeline.extraction.checking import held, recomputed
from pipeline.extraction.result import Extraction
from pipeline.ground import finetune_logits, logits, workplace
from pipeline.ground.finetune_logits import Model
from pipeline.ground.identity import digest
from pipeline.ground.logits import adapted
from pipeline.ground.model_config import edited
from pipeline.ground.peft_load import unplaced
from pipeline.ground.report import Finding, Gate, Report, Status
from pipeline.ground.sidefiles import write_side_files
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
from pipeline.weight import Adapter, Output, Part


@dataclass
class Proof:
    """Gates, figures by parameter and weight, and figures of the logits."""

    gates: list[Gate] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    logits: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any] | None:
        """For the report."""
        return {"logits": self.logits, "weights": self.weights} if self.weights else None


def proof(output: Output, adapter: Adapter, asked: Asked | None = None) -> Proof:
    """Everything that is asked of an adapter that was extracted; unless it is asked no model is run."""
    part = adapter.parts[0]
    extraction = part.extraction
    if extraction is None:
        return Proof()
    found = held(extraction, output.merged)
    proved = Proof(gates=[_taken(output, part), recomputed(extraction, found)])
    proved.weights = {name: one.as_dict() for name, one in found.items()}
    for p in extraction.chosen.lora:
        for pair in p.pairs:
            figures = {k: v for k, v in extraction.facts[p.name].items() if k not in ("energy", "captured")}
            proved.weights[pair.name] = {**figures, **proved.weights.get(pair.name, {})}
    if extraction.inputs:
        gate, shares = outputs.recomputed(extraction, output.merged)
        proved.gates.append(gate)
        for p in (p for p in extraction.chosen.lora if p.name in shares):
            proved.weights[p.pairs[0].name][f"{outputs.HELD}_verified"] = shares[p.name]
    if asked and asked.tokens and all(gate.status is not Status.failed for gate in proved.gates):
        _compare(output, adapter, extraction, asked, proved)
    return proved


def extracted(output: Output, proved: Proof, begun: float) -> Report:
    """The report of an output that is an adapter."""
    return Report(
        plan=output.plan,
        gates=tuple(proved.gates),
        findings=tuple(Finding(text) for text in proved.findings),
        extraction=proved.as_dict(),
        save=output.manifest.get("save", {}),
        manifest=output.manifest,
        seconds=time.monotonic() - begun,
    )


def _taken(output: Output, part: Part) -> Gate:
    wanted = "no key missing, none unexpected"
    edits = {key: value for key, value in output.merged.config_edits.items() if value is not None}
    config = edited(output.merged.config.read(), edits)
    try:
        missing, unexpected = unplaced(config, part.origin.folder)
    except logits.CannotCompare as reason:
        return Gate("PEFT", Status.skipped, str(reason), wanted)
    if missing or unexpected:
        first = (missing or unexpected)[0]
        seen = f"{len(missing)} keys missing, {len(unexpected)} unexpected, as {first}"
        return Gate("PEFT", Status.failed, seen, wanted)
    return Gate("PEFT", Status.passed, f"loads all of {len(part.deltas)} deltas", wanted)


def _compare(output: Output, adapter: Adapter, extraction: Extraction, asked: Asked, proved: Proof) -> None:
    """KL(finetune||extracted) / KL(finetune||base): base + adapter, or what stands merged in the output."""
    name, wanted = "nearness", "nearer to the fine-tune than the base is"
    base, tuned = extraction.base, extraction.tuned
    told = workplace.scratch(output.folder.with_name(output.folder.name.removesuffix(".partial"))) / "told"
    told.mkdir(parents=True, exist_ok=True)
    (told / "config.json").write_text(tuned.config.text(tuned.config_edits), "utf-8")
    write_side_files(told, tuned.side_files)

    def models(loaders: Loaders) -> finetune_logits.Extraction:
        plain = loaders.base(base, output.merged)
        merged = partial(adapted, plain, [(adapter.parts[0].origin.folder, 1.0)])
        return finetune_logits.Extraction(
            told,
            Model(loaders.base(tuned, tuned), lambda: digest(of_base(tuned, tuned))),
            Model(plain, lambda: digest(of_base(base, output.merged))),
            Model(merged if output.is_adapter else loaders.folder(output)),
        )

    with_adapter = num_parameters(base.weights) + num_trained(adapter)
    extracted = with_adapter if output.is_adapter else output.plan.num_parameters
    largest = max(extracted, num_parameters(base.weights), num_parameters(tuned.weights))
    vocabulary = max(num_classes(base.weights), num_classes(tuned.weights))
    try:
        outcome = compared(models, largest, vocabulary, asked)
    except (Skipped, logits.CannotCompare, logits.MergedDoesNotRun) as reason:
        seen, why = "they do not load", f": {reason}"
        if isinstance(reason, Skipped):
            seen, why = reason.seen, reason.finding
        proved.findings.append(f"base, fine-tune and what was extracted were not compared by logits{why}")
        proved.gates.append(Gate(name, Status.skipped, seen, wanted))
        return
    proved.findings += outcome.assumed
    proved.logits = figures = finetune_logits.named(outcome.figures)
    far = not figures["finite"] or figures["ratio_interval"][0] > 1
    status = Status.failed if far else Status.passed
    proved.gates.append(Gate(name, status, finetune_logits.as_text(figures), wanted))
