"""verify=structure: every name, shape, dtype and file as planned, untouched weights byte for byte."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.extraction.proving import extracted, proof
from pipeline.ground.compare import structure, unchanged
from pipeline.ground.report import Finding, Gate, Report, Status
from pipeline.ground.survival import survival
from pipeline.stage import Verify, stage
from pipeline.verification.diagnosing import belong, diagnose, surroundings
from pipeline.verification.untouched import untouched
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("structure")
@dataclass(frozen=True, kw_only=True)
class Structure(Verify):
    """The files alone: what is there, and that nothing else changed."""

    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report:
        begun = time.monotonic()
        proved = proof(output, adapter)
        if output.is_adapter:
            return extracted(output, proved, begun)
        gates = files(output, base)
        if all(gate.status is Status.passed for gate in gates) and output.statistics:
            gates.append(effect(output.statistics_as_dicts()))
        gates += [*proved.gates, *hashes(output)]
        seconds = time.monotonic() - begun
        return report(output, gates, base=base, extraction=proved.as_dict(), seconds=seconds)


def files(output: Output, base: Checkpoint[Weight]) -> list[Gate]:
    """Structure of the folder; if it stands, untouched weights against the base's bytes."""
    gate = structure(output.folder, output.plan)
    if gate.status is Status.failed:
        return [gate]
    return [gate, *belong(output), untouched(output)]


def hashes(output: Output) -> list[Gate]:
    """An output made earlier, with the hashes that it was published with: still the same files."""
    written = output.manifest.get("outputs")
    earlier = not output.statistics and isinstance(written, list)
    return [unchanged(output.folder, written)] if earlier and written else []


def effect(weights: Mapping[str, Mapping[str, Any]]) -> Gate:
    """Every target changed and nothing is infinite or NaN, by what save saw of all elements."""
    swallowed = [name for name, facts in weights.items() if facts["moved"] and not facts["changed"]]
    broken = [name for name, facts in weights.items() if not facts["finite"]]
    seen = f"{len(weights) - len(swallowed)} of {len(weights)} merged weights changed"
    if swallowed:
        seen += f", not {swallowed[0]}"
    if broken:
        seen += f"; {broken[0]} is not finite"
    status = Status.failed if swallowed or broken else Status.passed
    return Gate("effect", status, seen, "all of them, all finite")


def report(
    output: Output,
    gates: list[Gate],
    *findings: str,
    base: Checkpoint[Weight] | None = None,
    **parts: Any,
) -> Report:
    """The report of a verified output; given the base, with the likely causes of what failed."""
    failed = any(gate.status is Status.failed for gate in gates)
    if gates and not output.statistics:
        findings = (*findings, *surroundings(output).notes)
    findings = (*findings, *survival(output.statistics))
    return Report(
        plan=output.plan,
        gates=tuple(gates),
        findings=tuple(Finding(text) for text in findings),
        causes=diagnose(output, base) if failed and base else (),
        save=output.manifest.get("save", {}),
        manifest=output.manifest,
        **{"weights": output.statistics_as_dicts(), **parts},
    )
