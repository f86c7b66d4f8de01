"""verify=none: publishes what was written, unproved."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.report import Report
from pipeline.stage import Verify, stage
from pipeline.stages.verify.structure import report
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("none")
@dataclass(frozen=True, kw_only=True)
class NoVerify(Verify):
    """Checks nothing; the report says so."""

    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report:
        return report(output, [], "not verified: verify=none")
