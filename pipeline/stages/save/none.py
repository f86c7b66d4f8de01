"""save=none: looks at the request and writes nothing (recipe=inspect)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.stage import stage
from pipeline.stages.save.merged import SaveMerged
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("none")
@dataclass(frozen=True, kw_only=True)
class SaveNothing(SaveMerged):
    """The plan, and nothing else."""

    writes: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        raise AssertionError("a run with save=none ends with its plan")
