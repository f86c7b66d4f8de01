"""save=both: the merged checkpoint, and the adapter in a folder `adapter/` inside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.ground.adapter_format import CONFIG, WEIGHTS
from pipeline.stage import stage
from pipeline.stages.save.merged import SaveMerged
from pipeline.weight import Adapter


@stage("both")
@dataclass(frozen=True, kw_only=True)
class SaveBoth(SaveMerged):
    """As merged, with the adapter beside it for whoever serves it unmerged."""

    def _write_more(self, folder: Path, adapter: Adapter) -> None:
        (folder / "adapter").mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter.origin.folder / name, folder / "adapter" / name)
