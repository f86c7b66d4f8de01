"""Where every weight of an output lies, before a byte of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from pipeline.ground import dtypes
from pipeline.ground.codes.encoders import encoder as codes
from pipeline.ground.manifest import published
from pipeline.ground.report import Plan, unique
from pipeline.ground.rounding import Rounding, stream_of
from pipeline.ground.shards import SINGLE, Entry, Shard, Slot, lay_out
from pipeline.merging.combined import Combined
from pipeline.merging.contents import audited, contents
from pipeline.merging.pieces import Merged
from pipeline.output.place import Form, FormOf, Place, by_chance, parts_of
from pipeline.weight import Adapter, Checkpoint, Part, ShardLayout, Weight

_LARGEST_SHARD = 50 * 10**9  # bytes, where neither base nor recipe says; what transformers 5 does


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file to be written; `original` is the base's file where header and layout stay the same."""

    name: str
    header: bytes
    places: tuple[Place, ...]
    original: Shard | None
    metadata: Mapping[str, str]

    @property
    def slots(self) -> list[Slot]:
        """Its tensors, in the order of their bytes."""
        return sorted((s for place in self.places for s in place.slots), key=lambda s: (s.late, s.offset))

    @property
    def size(self) -> int:
        """Bytes of the file; the most it may have where it has a late tensor."""
        return len(self.header) + sum(slot.length for place in self.places for slot in place.slots)

    @property
    def in_order(self) -> bool:
        """Whether its bytes are made in the order in which they lie."""
        return all(isinstance(place.form, str) for place in self.places)

    def final_header(self, lengths: Mapping[str, int]) -> bytes:
        """The header once the bytes of the late tensors are known, as long as the one that was planned."""
        tensors = [(s.name, s.dtype, (lengths[s.name],) if s.late else s.shape) for s in self.slots]
        return lay_out(tensors, self.metadata, room=len(self.header))[0]


def plan_shards(
    checkpoint: Checkpoint[Weight],
    form: FormOf,
    max_shard_size: int | None,
    rounding: Rounding = Rounding.nearest,
    seed: int = 0,
) -> tuple[PlannedShard, ...]:
    """The shards of the output: the base's own, or groups of at most `max_shard_size` bytes.

    Merged weights are rounded as told, where what they are stored as knows more than one way.
    """
    weights = {weight.name: weight for weight in checkpoint.weights}
    forms = {name: form(weight) for name, weight in weights.items()}
    shards: Iterable[ShardLayout] = checkpoint.shards
    if max_shard_size or not checkpoint.shards:
        shards = _grouped(checkpoint.weights, forms, max_shard_size or _LARGEST_SHARD)

    def place(name: str, slots: Sequence[Slot]) -> Place:
        weight, form = weights[name], forms[name]
        if not isinstance(weight, Merged) or not by_chance(form):
            return Place(weight, form, slots[0], tuple(slots[1:]))
        return Place(weight, form, slots[0], tuple(slots[1:]), rounding, stream_of(seed, name))

    parts = {name: parts_of(weights[name], forms[name]) for name in weights}
    planned = tuple(_plan_shard(shard, parts, place) for shard in _complete(list(shards), weights))
    assert sorted(p.weight.name for shard in planned for p in shard.places) == sorted(weights)
    return planned


def _complete(shards: list[ShardLayout], weights: Mapping[str, Weight]) -> list[ShardLayout]:
    """The shards without weights that a merge dropped, the last one with those that it added."""
    kept = [replace(s, weights=tuple(n for n in s.weights if n in weights)) for s in shards]
    placed = {name for shard in kept for name in shard.weights}
    added = tuple(name for name in weights if name not in placed)
    if added:
        kept[-1] = replace(kept[-1], weights=(*kept[-1].weights, *added))
    return [shard for shard in kept if shard.weights]


def _plan_shard(
    shard: ShardLayout,
    parts: Mapping[str, Sequence[codes.Part]],
    place: Callable[[str, Sequence[Slot]], Place],
) -> PlannedShard:
    tensors = sorted((part for name in shard.weights for part in parts[name]), key=lambda part: part.late)
    told, original = [(part.name, part.dtype, part.shape) for part in tensors], shard.original
    metadata = {"format": "pt"} | (dict(original.metadata) if original else {})
    if original and not any(part.late for part in tensors) and _same(told, original.entries):
        header = original.header
        slots = [Slot(e.name, e.dtype, e.shape, e.extent.offset, e.extent.length) for e in original.entries]
    else:
        header, found = lay_out(told, metadata)
        late = {part.name for part in tensors if part.late}
        slots, original = [replace(slot, late=slot.name in late) for slot in found], None
    at = {slot.name: number for number, slot in enumerate(slots)}
    names = sorted(shard.weights, key=lambda name: at[parts[name][0].name])
    places = tuple(place(name, [slots[at[part.name]] for part in parts[name]]) for name in names)
    return PlannedShard(shard.name, header, places, original, metadata)


def _same(told: Sequence[tuple[str, str, tuple[int, ...]]], entries: Sequence[Entry]) -> bool:
    """Whether a file's tensors are these, in whatever order."""
    return sorted(told) == sorted((e.name, e.dtype, e.shape) for e in entries)


def _grouped(weights: Iterable[Weight], forms: Mapping[str, Form], limit: int) -> list[ShardLayout]:
    groups: list[list[str]] = [[]]
    filled = 0
    for weight in weights:
        size = sum(part.num_bytes for part in parts_of(weight, forms[weight.name]))
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
    return Plan(**{**told, "contents": contents(adapter), "trained": audited(merged, adapter), **more})


def _names(merged: Checkpoint[Weight], adapter: Adapter) -> str:
    """The adapters with their weights, and how they are combined if not by their sum."""
    names = " + ".join(_name(part) for part in adapter.parts)
    ways = {w.combination.describe() for w in merged.weights if isinstance(w, Combined)}
    return f"{names} ({'; '.join(sorted(ways))})" if ways else names


def _name(part: Part) -> str:
    name = published(part.origin).name
    return name if part.weight == 1 else f"{part.weight:g} {name}"


def tile_bytes(shards: Iterable[PlannedShard]) -> int:
    """Bytes that the largest tile needs while it is computed."""
    return max((place.tile_bytes for shard in shards for place in shard.places), default=0)


def factor_bytes(shards: Iterable[PlannedShard]) -> int:
    """Bytes that the largest weight holds beside its tiles."""
    return max((place.state_bytes for shard in shards for place in shard.places), default=0)
