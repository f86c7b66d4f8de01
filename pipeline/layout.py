"""Where every weight of an output lies, before a byte of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from pipeline.combined import Combined
from pipeline.contents import contents
from pipeline.ground import dtypes, tiles
from pipeline.ground.manifest import published
from pipeline.ground.report import Action, Plan, PlannedWeight, unique
from pipeline.ground.shards import SINGLE, Shard, Slot, lay_out
from pipeline.weight import Adapter, Checkpoint, FromAdapter, Merged, Part, ShardLayout, Weight

_LARGEST_SHARD = 50 * 10**9  # bytes, where neither base nor recipe says; what transformers 5 does

StoredDtype = Callable[[Weight], str]


@dataclass(frozen=True, slots=True)
class Place:
    """A weight, and the bytes of a shard that it will fill."""

    weight: Weight
    slot: Slot

    @property
    def action(self) -> Action:
        if isinstance(self.weight, Merged):
            return Action.merged
        if isinstance(self.weight, FromAdapter):
            return Action.saved
        if self.weight.source is None:
            return Action.decoded
        return Action.copied if self.slot.dtype == self.weight.dtype else Action.cast

    @property
    def grid(self) -> list[tuple[int, int]]:
        """The row ranges in which it is computed."""
        return list(tiles.grid(self.weight.num_rows, self.weight.num_columns, self.weight.grain))

    def planned(self) -> PlannedWeight:
        """This weight for the plan."""
        return PlannedWeight(
            name=self.slot.name,
            shape=self.slot.shape,
            dtype=self.slot.dtype,
            num_bytes=self.slot.length,
            action=self.action,
            source=self.weight.stored_as,
            deltas=_deltas(self.weight),
        )


def _deltas(weight: Weight) -> tuple[str, ...]:
    if isinstance(weight, FromAdapter):
        return ("saved whole",)
    if isinstance(weight, Merged):
        return (*_deltas(weight.base), *(placed.describe() for placed in weight.placed))
    return ()


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file to be written; `original` is the base's file where header and layout stay the same."""

    name: str
    header: bytes
    places: tuple[Place, ...]
    original: Shard | None

    @property
    def size(self) -> int:
        return len(self.header) + sum(place.slot.length for place in self.places)


def plan_shards(
    checkpoint: Checkpoint[Weight], dtype: StoredDtype, max_shard_size: int | None
) -> tuple[PlannedShard, ...]:
    """The shards of the output: the base's own, or groups of at most `max_shard_size` bytes."""
    weights = {weight.name: weight for weight in checkpoint.weights}
    shards: Iterable[ShardLayout] = checkpoint.shards
    if max_shard_size or not checkpoint.shards:
        shards = _grouped(checkpoint.weights, dtype, max_shard_size or _LARGEST_SHARD)
    planned = tuple(_plan_shard(shard, weights, dtype) for shard in _complete(list(shards), weights))
    assert sorted(p.slot.name for shard in planned for p in shard.places) == sorted(weights)
    return planned


def _complete(shards: list[ShardLayout], weights: Mapping[str, Weight]) -> list[ShardLayout]:
    """The shards without weights that a merge dropped, the last one with those that it added."""
    kept = [replace(s, weights=tuple(n for n in s.weights if n in weights)) for s in shards]
    placed = {name for shard in kept for name in shard.weights}
    added = tuple(name for name in weights if name not in placed)
    if added:
        kept[-1] = replace(kept[-1], weights=(*kept[-1].weights, *added))
    return [shard for shard in kept if shard.weights]


def _plan_shard(shard: ShardLayout, weights: Mapping[str, Weight], dtype: StoredDtype) -> PlannedShard:
    tensors = [(name, dtype(weights[name]), weights[name].shape) for name in shard.weights]
    original = shard.original
    if original and tensors == [(e.name, e.dtype, e.shape) for e in original.entries]:
        header = original.header
        slots = tuple(
            Slot(e.name, e.dtype, e.shape, e.extent.offset, e.extent.length) for e in original.entries
        )
    else:
        metadata = {"format": "pt"} | (dict(original.metadata) if original else {})
        header, slots = lay_out(tensors, metadata)
        original = None
    return PlannedShard(shard.name, header, tuple(Place(weights[s.name], s) for s in slots), original)


def _grouped(weights: Iterable[Weight], dtype: StoredDtype, limit: int) -> list[ShardLayout]:
    groups: list[list[str]] = [[]]
    filled = 0
    for weight in weights:
        size = dtypes.num_bytes(dtype(weight), weight.shape) or 0
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(weight.name)
        filled += size
    if len(groups) == 1:
        return [ShardLayout(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [
        ShardLayout(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def describe(
    shards: Sequence[PlannedShard], merged: Checkpoint[Weight], adapter: Adapter, /, **more: Any
) -> Plan:
    """The plan of an output with these shards; `more` are its fields that the shards do not tell."""
    arithmetic = {w.arithmetic for w in merged.weights if isinstance(w, Merged)}
    told = {
        "base": published(merged.origin).name,
        "adapter": _names(merged, adapter),
        "merge_dtype": ", ".join(sorted(dtypes.config_name(dtype) for dtype in arithmetic)),
        "weights": tuple(place.planned() for shard in shards for place in shard.places),
        "shards": {shard.name: shard.size for shard in shards},
        "num_parameters": sum(prod(weight.shape) for weight in merged.weights),
        "findings": tuple(unique(merged.findings, adapter.findings)),
    }
    return Plan(**{**told, "contents": contents(adapter), **more})


def _names(merged: Checkpoint[Weight], adapter: Adapter) -> str:
    """The adapters with their weights, and how they are combined if not by their sum."""
    names = " + ".join(_name(part) for part in adapter.parts)
    ways = {w.combination.describe() for w in merged.weights if isinstance(w, Combined)}
    return f"{names} ({'; '.join(sorted(ways))})" if ways else names


def _name(part: Part) -> str:
    name = published(part.origin).name
    return name if part.weight == 1 else f"{part.weight:g} {name}"


def tile_bytes(shards: Iterable[PlannedShard]) -> int:
    """Bytes that the largest tile needs while it is computed: raw, base, delta, value, stored."""
    return max(
        (
            min(tiles.tile_rows(w.num_columns, w.grain), w.num_rows)
            * w.num_columns
            * (w.bytes_per_element if isinstance(w, Merged) else 4 * 3 + 4)
            for shard in shards
            for w in (place.weight for place in shard.places)
        ),
        default=0,
    )


def factor_bytes(shards: Iterable[PlannedShard]) -> int:
    """Bytes that the largest weight holds beside its tiles: deltas, scales, packed codes."""
    return max((place.weight.state_bytes for shard in shards for place in shard.places), default=0)
