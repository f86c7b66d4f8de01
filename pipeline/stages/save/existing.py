"""save=existing: writes nothing, takes the merged model that stands at `output` (recipe=verify)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pipeline.ground import dtypes
from pipeline.ground.adapter_format import CONFIG
from pipeline.ground.errors import Refused
from pipeline.ground.manifest import NAME
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.report import Plan
from pipeline.ground.shards import read_checkpoint
from pipeline.ground.tables import read_table
from pipeline.ground.written import codes_in, said_of_codes
from pipeline.output.layout import describe, plan_shards
from pipeline.output.quantizing import Forms, found_as
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
        if (self.output / CONFIG).is_file() and not (self.output / "config.json").is_file():
            raise Refused(
                f"output: '{self.output}' holds an adapter, and save=existing checks merged models; an "
                "extraction is proved while it is made"
            )
        read_checkpoint(self.output)
        ConfigFile(self.output / "config.json").check()
        if (self.output / NAME).is_file():
            read_table(self.output / NAME)

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        if any(part.extraction for part in adapter.parts):
            raise Refused("save: existing checks a model merged with an adapter that exists; extract first")
        shards = read_checkpoint(self.output)
        dtypes_found = {e.dtype for shard in shards for e in shard.entries}
        forms = self._found(merged)
        return describe(
            plan_shards(forms.checkpoint, lambda w: forms.of[w.name], None),
            forms.checkpoint,
            adapter,
            output=self.output.name,
            dtype=", ".join(sorted({dtypes.config_name(d) for d in dtypes_found})),
            shards={shard.file.path.name: shard.file.size for shard in shards},
            peak_memory=0,
            disk=0,
        )

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        plan, forms = self.plan(merged, adapter), self._found(merged)
        grown = replace(forms.checkpoint, config_edits=forms.config_edits)
        return Output(self.output, plan, grown, adapter, manifest=self._manifest())

    def _manifest(self) -> dict[str, Any]:
        """What the output says of itself; {} where it says nothing."""
        path = self.output / NAME
        return read_table(path) if path.is_file() else {}

    def _found(self, merged: Checkpoint[Weight]) -> Forms:
        """What every weight is held as there; Refused for codes that cannot be judged."""
        shards = read_checkpoint(self.output)
        entries = {entry.name: entry for shard in shards for entry in shard.entries}
        known = self._manifest().get("weights")
        weights = known if isinstance(known, dict) else {}
        actions = {name: w.get("action") for name, w in weights.items() if isinstance(w, dict)}
        return found_as(merged, entries, codes_in(self.output), said_of_codes(self.output), actions)
