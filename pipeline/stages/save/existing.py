"""save=existing: writes nothing, takes the merged model that stands at `output` (recipe=verify)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.ground import dtypes
from pipeline.ground.errors import Refused
from pipeline.ground.manifest import NAME
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.report import Plan
from pipeline.ground.shards import read_checkpoint
from pipeline.ground.tables import read_table
from pipeline.layout import describe, plan_shards
from pipeline.stage import Save, stage
from pipeline.weight import Adapter, Checkpoint, Output, Weight


@stage("existing")
@dataclass(frozen=True, kw_only=True)
class Existing(Save):
    """A merged model made earlier, by this tool or another."""

    writes: ClassVar[bool] = False

    def check(self) -> None:
        if not self.output.is_dir():
            raise Refused(
                f"output: '{self.output}' is not a folder; save=existing checks a merged model there"
            )
        read_checkpoint(self.output)
        ConfigFile(self.output / "config.json").check()
        if (self.output / NAME).is_file():
            read_table(self.output / NAME)

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        if any(part.extraction for part in adapter.parts):
            raise Refused("save: existing checks a model merged with an adapter that exists; extract first")
        shards = read_checkpoint(self.output)
        stored = {e.name: e.dtype for shard in shards for e in shard.entries}
        planned = plan_shards(merged, lambda w: stored.get(w.name, w.dtype), None)
        return describe(
            planned,
            merged,
            adapter,
            output=self.output.name,
            dtype=", ".join(sorted({dtypes.config_name(d) for d in stored.values()})),
            shards={shard.file.path.name: shard.file.size for shard in shards},
            peak_memory=0,
            disk=0,
        )

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        manifest = self.output / NAME
        known = read_table(manifest) if manifest.is_file() else {}
        return Output(self.output, self.plan(merged, adapter), merged, adapter, manifest=known)
