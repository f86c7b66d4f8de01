"""save=merged: the merged checkpoint, streamed tile by tile into shards laid out beforehand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.ground import dtypes, hub, workplace
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.digests import Digests
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.manifest import Contents, peak_memory, published, write_beside
from pipeline.ground.progress import Progress
from pipeline.ground.report import Plan
from pipeline.ground.sidefiles import SideFile, brings_tokenizer, chosen, write_side_files
from pipeline.ground.units import parse_bytes, show_bytes
from pipeline.layout import PlannedShard, describe, factor_bytes, plan_shards, tile_bytes
from pipeline.stage import Save, stage
from pipeline.stream import Written, num_workers, write_shards
from pipeline.weight import Adapter, Checkpoint, Output, Weight


class SaveDtype(Enum):
    """The dtypes that an output may have."""

    keep = "keep"
    bfloat16 = "BF16"
    float16 = "F16"
    float32 = "F32"


@stage("merged")
@dataclass(frozen=True, kw_only=True)
class SaveMerged(Save):
    """A checkpoint folder with the base's shards, names and side files."""

    dtype: SaveDtype = SaveDtype.keep
    """dtype of the weights; keep: the base's own (bfloat16 for GGUF)"""
    max_shard_size: str | None = None
    """largest shard, as 5GB; default: the base's shards"""

    def check(self) -> None:
        super().check()
        check_device(self.device)
        if self.max_shard_size is not None:
            parse_bytes("save.max_shard_size", self.max_shard_size)

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        shards = self._shards(merged)
        disk = sum(shard.size for shard in shards)
        if self.writes and (free := workplace.free_for(self.output)) < disk:
            raise Refused(
                f"output: '{self.output}' needs {show_bytes(disk)}, but its disk has {show_bytes(free)} free"
            )
        return describe(
            shards,
            merged,
            adapter,
            output=self.output.name,
            dtype=dtypes.config_name(self._stored_dtype(merged.dtype, merged.dtype)),
            peak_memory=self._window(shards) * tile_bytes(shards) + 2 * factor_bytes(shards),
            disk=disk,
        )

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        plan, shards = self.plan(merged, adapter), self._shards(merged)
        folder = workplace.partial(self.output)
        config = merged.config.text(self._config_edits(merged))  # what may fail comes before the long part
        origins = write_side_files(folder, chosen(merged.side_files, tokenizer_of(adapter)))
        self._write_more(folder, adapter)
        begun = time.monotonic()
        known = known_digests(merged.origin, *(part.origin for part in adapter.parts))
        with (
            Digests((*merged.files, *adapter.files), known) as inputs,
            Progress("merging", plan.num_bytes) as bar,
        ):
            written = write_shards(shards, folder, resolve_device(self.device), self._window(shards), bar)
            _refuse_broken(written, plan.dtype)
            hashed = inputs.result()
        seconds = time.monotonic() - begun
        manifest = write_beside(
            folder,
            Contents(
                plan=plan,
                config=config,
                side_files=origins,
                base=published(merged.origin),
                adapters=[(published(p.origin), p.weight) for p in adapter.parts],
                trained_on=adapter.parts[0].config.get("base_model_name_or_path"),
                inputs=hashed,
                shards={shard.name: [place.slot.name for place in shard.places] for shard in shards},
                digests=written.digests,
                statistics=written.statistics,
            ),
        )
        manifest["save"] = {
            "seconds": seconds,
            "peak_memory": peak_memory(),
            "bytes": plan.disk,
        }
        return Output(folder, plan, merged, adapter, written.statistics, manifest)

    def _write_more(self, folder: Path, adapter: Adapter) -> None:
        """For a stage that writes more than the merged model."""

    def _stored_dtype(self, main: str, own: str) -> str:
        """The stored dtype of a weight: what is asked for, where its own is the checkpoint's main one."""
        return own if self.dtype is SaveDtype.keep or own != main else self.dtype.value

    def _shards(self, merged: Checkpoint[Weight]) -> tuple[PlannedShard, ...]:
        limit = self.max_shard_size and parse_bytes("save.max_shard_size", self.max_shard_size)
        return plan_shards(merged, lambda w: self._stored_dtype(merged.dtype, w.dtype), limit or None)

    def _config_edits(self, merged: Checkpoint[Weight]) -> dict[str, Any]:
        dtype = self._stored_dtype(merged.dtype, merged.dtype)
        edits = {} if self.dtype is SaveDtype.keep else {"dtype": dtypes.config_name(dtype)}
        return {**merged.config_edits, **edits}

    def _window(self, shards: tuple[PlannedShard, ...]) -> int:
        """Tiles in flight: enough for the workers and a little more, fewer where memory is short."""
        wanted, tile, factors = num_workers() + 4, tile_bytes(shards), 2 * factor_bytes(shards)
        if self.memory_limit is None:
            return wanted
        if self.memory_limit < tile + factors:
            raise Refused(
                f"memory_limit: {show_bytes(self.memory_limit)} is less than the largest tile and its "
                f"deltas need, {show_bytes(tile + factors)}"
            )
        return min(wanted, (self.memory_limit - factors) // max(tile, 1))


def tokenizer_of(adapter: Adapter) -> tuple[SideFile, ...]:
    """The side files of the first adapter that brings a tokenizer."""
    return next((p.side_files for p in adapter.parts if brings_tokenizer(p.side_files)), ())


def known_digests(*origins: hub.Source) -> dict[Path, str]:
    """The hashes that the Hub gave with what was fetched from it."""
    return {origin.folder / name: sha for origin in origins for name, sha in hub.digests(origin).items()}


def _refuse_broken(written: Written, dtype: str) -> None:
    broken = [name for name, facts in written.statistics.items() if not facts.finite] + written.overflown
    if broken:
        hint = "; save.dtype=bfloat16 has a wider range" if dtype == "float16" else ""
        raise PipelineError(
            f"{broken[0]}: holds values that are not finite in the output ({len(broken)} weights){hint}"
        )
