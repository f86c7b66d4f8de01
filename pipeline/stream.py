"""The pass over all weights: tiles computed and written by workers, hashed and counted in file order."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.ground.digests import Digest
from pipeline.ground.files import read_into
from pipeline.ground.metrics import Statistics, TileFacts, is_finite, is_sampled, tile_facts
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.report import Action
from pipeline.ground.rounding import round_to
from pipeline.ground.shard_writer import ShardWriter
from pipeline.layout import Place, PlannedShard
from pipeline.weight import Tiles

_COPY_CHUNK = 1 << 20


class Written(NamedTuple):
    """What a pass leaves behind."""

    digests: list[Digest]
    statistics: dict[str, Statistics]
    overflown: list[str]  # weights that no delta reached, but whose dtype no longer holds their values


class _Chunk(NamedTuple):
    """Bytes that stand in their shard, to be hashed in turn."""

    writer: ShardWriter
    place: Place
    buffer: memoryview
    facts: TileFacts | None = None
    overflown: bool = False


_Task = Callable[[], "_Chunk | Callable[[], None]"]  # a chunk, or what to do once all before it are done


def num_workers() -> int:
    """Threads that compute and write; no byte of the result depends on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores))


def write_shards(
    shards: Iterable[PlannedShard], folder: Path, device: str, window: int, bar: Progress
) -> Written:
    """Writes all shards into the folder; at most `window` tiles are in memory at a time."""
    keep_freed_memory()
    digests: list[Digest] = []
    facts: dict[str, list[TileFacts]] = defaultdict(list)
    sizes: dict[str, int] = {}
    overflown: dict[str, None] = {}
    with (
        ExitStack() as opened,  # what a failed run leaves open is closed once its workers have ended
        plain_arithmetic(),
        in_order(
            _tasks(shards, folder, device, opened, lambda writer: digests.append(writer.digest())),
            num_workers(),
            window,
        ) as done,
    ):
        for chunk in done:
            if not isinstance(chunk, _Chunk):
                chunk()
                continue
            chunk.writer.hashed(chunk.buffer)
            bar.advance(len(chunk.buffer))
            if chunk.overflown:
                overflown[chunk.place.slot.name] = None
            if chunk.facts:
                facts[chunk.place.slot.name].append(chunk.facts)
                sizes[chunk.place.slot.name] = chunk.place.weight.num_rows * chunk.place.weight.num_columns
    statistics = {name: Statistics.gathered(sizes[name], facts[name]) for name in facts}
    return Written(digests, statistics, list(overflown))


def _tasks(
    shards: Iterable[PlannedShard],
    folder: Path,
    device: str,
    opened: ExitStack,
    finished: Callable[[ShardWriter], None],
) -> Iterator[_Task]:
    for shard in shards:
        original = shard.original.file if shard.original else None
        writer = ShardWriter(folder / shard.name, shard.header, shard.size, original)
        opened.callback(writer.close)
        for place in shard.places:
            chunks = _copies if place.action is Action.copied else _tiles
            weight = opened.enter_context(ExitStack())
            yield from chunks(place, writer, device, weight)
            yield partial(_then, weight.close)
        yield partial(_then, partial(finished, writer))
        yield partial(_then, writer.close)


def _then(action: Callable[[], None]) -> Callable[[], None]:
    return action


def _copies(place: Place, writer: ShardWriter, device: str, opened: ExitStack) -> Iterator[_Task]:
    source = place.weight.source
    assert source is not None
    descriptor = opened.enter_context(source.extent.file.opened())

    def copy(start: int, stop: int) -> _Chunk:
        buffer = memoryview(bytearray(stop - start))
        read_into(descriptor, source.extent.offset + start, buffer)
        if not writer.cloned:
            writer.write(place.slot.offset + start, buffer)
        return _Chunk(writer, place, buffer)

    for start in range(0, place.slot.length, _COPY_CHUNK):
        yield partial(copy, start, min(start + _COPY_CHUNK, place.slot.length))


def _tiles(place: Place, writer: ShardWriter, device: str, opened: ExitStack) -> Iterator[_Task]:
    if not place.slot.length:
        return
    tiles = opened.enter_context(place.weight.open(device))
    grid = place.grid
    for number, (start, stop) in enumerate(grid):
        yield partial(_tile, place, writer, tiles, start, stop, is_sampled(number, len(grid)))


def _tile(place: Place, writer: ShardWriter, tiles: Tiles, start: int, stop: int, sampled: bool) -> _Chunk:
    import torch

    slot = place.slot
    tile = tiles(start, stop)
    stored = round_to(tile.value, slot.dtype)
    facts, overflown = None, False
    if tile.delta is None:
        overflown = not is_finite(stored) and bool((tile.value.isfinite() & ~stored.isfinite()).any())
    else:
        facts = tile_facts(stored, tile.base, round_to(tile.base, slot.dtype), tile.delta, sampled)
    buffer = memoryview(stored.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    writer.write(slot.offset + start * (slot.length // place.weight.num_rows), buffer)
    return _Chunk(writer, place, buffer, facts, overflown)
