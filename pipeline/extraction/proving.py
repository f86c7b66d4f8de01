"""What verification asks of an extracted adapter: that PEFT takes it, what it holds, how near it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from math import prod
from typing import Any

from pipeline.extraction import outputs
from pipeline.extraction.checking import held, recomputed
from pipeline.ground import finetune_logits, logits, workplace
from pipeline.ground.device import memory_free
from pipeline.ground.identity import digest
from pipeline.ground.model_config import edited
from pipeline.ground.peft_load import unplaced
from pipeline.ground.report import Finding, Gate, Report, Status
from pipeline.ground.sidefiles import write_side_files
from pipeline.ground.units import show_bytes
from pipeline.same_base import of_base
from pipeline.weight import Adapter, Checkpoint, Output, Part, Weight

Loader = Callable[[Checkpoint[Weight], Checkpoint[Weight]], Callable[[type], Any]]


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


def proof(
    output: Output,
    adapter: Adapter,
    tokens: int,
    device: str,
    memory: int | None,
    loader: Loader | None,
    text: str | None = None,
) -> Proof:
    """Everything that is asked of an adapter that was extracted; without a loader no model is run."""
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
    if loader and tokens and all(gate.status is not Status.failed for gate in proved.gates):
        _compare(output, part, tokens, text or _sample(), device, memory, loader, proved)
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


def _sample() -> str:
    return package_files("pipeline.ground").joinpath("sample.txt").read_text("utf-8")


def _compare(
    output: Output,
    part: Part,
    tokens: int,
    text: str,
    device: str,
    memory: int | None,
    loader: Loader,
    proved: Proof,
) -> None:
    """KL(finetune||extracted) / KL(finetune||base), where the models fit into memory."""
    name, wanted = "nearness", "nearer to the fine-tune than the base is"
    extraction = part.extraction
    assert extraction is not None
    tuned = extraction.tuned
    vocabulary = max((prod(w.shape[:1]) for w in tuned.weights if len(w.shape) == 2), default=1)
    parameters = sum(prod(w.shape) for w in tuned.weights)
    needed = logits.memory_needed(parameters, vocabulary, tokens)
    free = memory or memory_free(device)
    if needed > free:
        short = f"that takes {show_bytes(needed)} of memory, {show_bytes(free)} are free"
        proved.findings.append(f"base, adapter and fine-tune were not compared by their logits: {short}")
        proved.gates.append(Gate(name, Status.skipped, "not enough memory", wanted))
        return
    told = workplace.scratch(output.folder.with_name(output.folder.name.removesuffix(".partial"))) / "told"
    told.mkdir(parents=True, exist_ok=True)
    (told / "config.json").write_text(tuned.config.text(tuned.config_edits), "utf-8")
    write_side_files(told, tuned.side_files)
    try:
        figures, assumed = finetune_logits.compare(
            told,
            part.origin.folder,
            loader(extraction.base, output.merged),
            loader(tuned, tuned),
            text,
            tokens,
            device,
            lambda: digest(of_base(extraction.base, output.merged)),
            lambda: digest(of_base(tuned, tuned)),
        )
    except (logits.CannotCompare, logits.MergedDoesNotRun) as reason:
        proved.findings.append(f"base, adapter and fine-tune were not compared by their logits: {reason}")
        proved.gates.append(Gate(name, Status.skipped, "they do not load", wanted))
        return
    proved.findings += assumed
    proved.logits = figures
    far = not figures["finite"] or figures["ratio_interval"][0] > 1
    status = Status.failed if far else Status.passed
    proved.gates.append(Gate(name, status, finetune_logits.as_text(figures), wanted))
