"""save=merged: the merged checkpoint, streamed tile by tile into shards laid out beforehand."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.ground import dtypes, hub, workplace
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.digests import Digests
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.files import File
from pipeline.ground.manifest import Contents, peak_memory, published, write_beside
from pipeline.ground.progress import Progress
from pipeline.ground.report import Plan
from pipeline.ground.rounding import Rounding
from pipeline.ground.sidefiles import SideFile, brings_tokenizer, chosen, write_side_files
from pipeline.ground.units import parse_bytes, show_bytes
from pipeline.merging.trained_base import which_base
from pipeline.output.layout import PlannedShard, describe, factor_bytes, plan_shards, tile_bytes
from pipeline.output.quantizing import Forms, by_chance, held_as
from pipeline.output.quantizing import check as check_quantize
from pipeline.output.stream import Written, num_workers, write_shards
from pipeline.stage import Save, stage
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
    rounding: Rounding = Rounding.nearest
    """nearest, stochastic, or auto: stochastic where nearest keeps less than 0.97 of a weight's delta"""
    quantize: str | None = None
    """nf4, nf4-dq, fp4, int8, fp8-block, fp8-channel, int4-g128, or keep: the base's own format"""
    seed: int = 0
    """for everything random"""

    def check(self) -> None:
        super().check()
        check_device(self.device)
        check_quantize(self.quantize)
        fine = self.quantize is None and self.dtype is SaveDtype.float32
        if self.rounding is Rounding.stochastic and (fine or not by_chance(self.quantize)):
            raise Refused(
                f"save.rounding: stochastic means nothing for {'float32' if fine else self.quantize}; it is "
                "for bfloat16, float16 and fp8; use nearest, or auto"
            )
        if self.max_shard_size is not None:
            parse_bytes("save.max_shard_size", self.max_shard_size)

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        forms, shards = self._laid_out(merged, adapter)
        disk = sum(shard.size for shard in shards)
        if self.writes and (free := workplace.free_for(self.output)) < disk:
            raise Refused(
                f"output: '{self.output}' needs {show_bytes(disk)}, but its disk has {show_bytes(free)} free"
            )
        bases = which_base(merged, adapter)
        plan = describe(
            shards,
            replace(forms.checkpoint, findings=(*forms.checkpoint.findings, *bases.findings)),
            adapter,
            output=self.output.name,
            dtype=dtypes.config_name(self._stored_dtype(merged.dtype, merged.dtype)),
            peak_memory=self._window(shards) * tile_bytes(shards) + 2 * factor_bytes(shards),
            disk=disk,
            quantized=self.quantize or "",
            rounding=self.rounding.value,
        )
        weights = (replace(weight, base_shift=bases.shifts.get(weight.name)) for weight in plan.weights)
        return replace(plan, weights=tuple(weights))

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        plan, (forms, shards) = self.plan(merged, adapter), self._laid_out(merged, adapter)
        folder = workplace.partial(self.output)
        config = merged.config.text(self._config_edits(merged, forms))  # what may fail comes first
        beside = chosen(forms.checkpoint.side_files, tokenizer_of(adapter))
        origins = write_side_files(folder, beside)
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
        tuned = [part.extraction.tuned for part in adapter.parts if part.extraction]
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
                owners=["base" for _ in merged.files] + [_owner(file, tuned) for file in adapter.files],
                finetune=published(tuned[0].origin) if tuned else None,
                shards={shard.name: [slot.name for slot in shard.slots] for shard in shards},
                num_bytes=sum(written.num_bytes.values()),
                digests=written.digests,
                statistics=written.statistics,
            ),
        )
        manifest["save"] = {
            "seconds": seconds,
            "peak_memory": peak_memory(),
            "bytes": plan.disk,
        }
        return Output(folder, plan, forms.checkpoint, adapter, written.statistics, manifest)

    def _write_more(self, folder: Path, adapter: Adapter) -> None:
        """For a stage that writes more than the merged model."""

    def _stored_dtype(self, main: str, own: str) -> str:
        """The stored dtype of a weight: what is asked for, where its own is the checkpoint's main one."""
        return own if self.dtype is SaveDtype.keep or own != main else self.dtype.value

    def _laid_out(
        self, merged: Checkpoint[Weight], adapter: Adapter
    ) -> tuple[Forms, tuple[PlannedShard, ...]]:
        """What every weight is held as, and where."""
        limit = self.max_shard_size and parse_bytes("save.max_shard_size", self.max_shard_size)
        forms = held_as(merged, self.quantize, lambda w: self._stored_dtype(merged.dtype, w.dtype))
        form = lambda weight: forms.of[weight.name]  # noqa: E731
        return forms, plan_shards(forms.checkpoint, form, limit or None, self.rounding, self.seed)

    def _config_edits(self, merged: Checkpoint[Weight], forms: Forms) -> dict[str, Any]:
        dtype = self._stored_dtype(merged.dtype, merged.dtype)
        edits = {} if self.dtype is SaveDtype.keep else {"dtype": dtypes.config_name(dtype)}
        return {**forms.config_edits, **edits}

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


def _owner(file: File, tuned: list[Checkpoint[Weight]]) -> str:
    """Whose a file is that the adapter brings: its own, or that of the fine-tune it was extracted from."""
    return "finetune" if any(file in checkpoint.files for checkpoint in tuned) else "adapter"


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
