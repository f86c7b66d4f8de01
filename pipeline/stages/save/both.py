"""save=both: the merged checkpoint, and the adapter in a folder `adapter/` inside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.ground.adapter_format import CONFIG, WEIGHTS
from pipeline.ground.errors import Refused
from pipeline.ground.report import Plan
from pipeline.merging.combined import Combined
from pipeline.merging.pieces import Merged
from pipeline.stage import stage
from pipeline.stages.save.merged import SaveMerged
from pipeline.weight import Adapter, Checkpoint, Weight


@stage("both")
@dataclass(frozen=True, kw_only=True)
class SaveBoth(SaveMerged):
    """As merged, with the adapter beside it for whoever serves it unmerged."""

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        factors = {p.factor for w in merged.weights if isinstance(w, Merged) for p in w.placed}
        if factors - {1.0}:
            raise Refused(
                f"save: both would keep the adapter as it is beside a model merged with merge.weight="
                f"{min(factors):g}, which is not the same; use save=merged"
            )
        if any(isinstance(weight, Combined) for weight in merged.weights):
            raise Refused(
                "save: both would keep an adapter beside a model that is not base + adapter, since merge= "
                "takes only part of it; use save=merged"
            )
        if len(adapter.parts) > 1:
            raise Refused(
                "save: both keeps one adapter beside the merged model, not several; use save=merged"
            )
        return super().plan(merged, adapter)

    def _write_more(self, folder: Path, adapter: Adapter) -> None:
        (folder / "adapter").mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter.parts[0].origin.folder / name, folder / "adapter" / name)
