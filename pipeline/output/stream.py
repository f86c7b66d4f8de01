"""The pass over all weights: tiles computed and written by workers, hashed and counted in file order."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.ground.digests import Digest
from pipeline.ground.files import as_bytes, read_into
from pipeline.ground.in_flight import InFlight
from pipeline.ground.metrics import Statistics, is_sampled
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.report import Action
from pipeline.ground.shard_writer import ShardWriter
from pipeline.ground.shards import Entry, Slot
from pipeline.output.layout import PlannedShard
from pipeline.output.place import Held, Place
from pipeline.output.storing import Made, Storing, storing

_COPY_CHUNK = 1 << 20


class Written(NamedTuple):
    """What a pass leaves behind."""

    digests: list[Digest]
    statistics: dict[str, Statistics]
    overflown: list[str]  # weights that no delta reached, but whose dtype no longer holds their values
    num_bytes: dict[str, int]  # of every tensor


class _Chunk(NamedTuple):
    """Bytes that stand in their shard, to be hashed in turn; then `done` is called."""

    writer: ShardWriter
    buffer: memoryview
    done: Callable[[], None] | None = None


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
    flushed: list[Future[None]] = []
    in_flight = InFlight(device, num_workers())
    written = _Writing(folder, in_flight, window, bar)
    with (
        ExitStack() as opened,  # what a failed run leaves open is closed once its workers have ended
        ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing,
        ThreadPoolExecutor(1, thread_name_prefix="flush") as flushing,
        plain_arithmetic(),
        in_order(written.tasks(shards, opened, hashing), num_workers(), window) as done,
    ):
        opened.callback(in_flight.give_back)
        for chunk in done:
            if not isinstance(chunk, _Chunk):
                chunk()
                continue
            chunk.writer.hashed(chunk.buffer)
            bar.advance(len(chunk.buffer))
            if flush := chunk.writer.flush():
                flushed.append(flushing.submit(flush))
            if chunk.done:
                chunk.done()
    for future in flushed:
        future.result()  # the kernel tells of a failed write once: to whoever asks first
    digests = [future.result() for future in written.digests]
    return Written(digests, written.statistics, list(written.overflown), written.num_bytes)


class _Writing:
    """A pass: its tasks, and what they find."""

    def __init__(self, folder: Path, in_flight: InFlight, window: int, bar: Progress) -> None:
        self._folder, self._in_flight, self._window, self._bar = folder, in_flight, window, bar
        self.digests: list[Future[Digest]] = []
        self.statistics: dict[str, Statistics] = {}
        self.overflown: dict[str, None] = {}
        self.num_bytes: dict[str, int] = {}

    def tasks(self, shards: Iterable[PlannedShard], opened: ExitStack, hashing: Executor) -> Iterator[_Task]:
        for shard in shards:
            original = shard.original.file if shard.original else None
            path = self._folder / shard.name
            writer = ShardWriter(path, shard.header, shard.size, original, shard.in_order)
            opened.callback(writer.close)
            self.num_bytes |= {slot.name: slot.length for slot in shard.slots}
            late: dict[str, memoryview] = {}
            for place in shard.places:
                weight = opened.enter_context(ExitStack())
                if place.action is Action.copied:
                    yield from _copies(place, writer, weight)
                else:
                    yield from self._tiles(place, writer, weight, late)
                yield partial(_then, weight.close)
            if any(slot.late for slot in shard.slots):
                yield partial(_then, partial(self._complete, shard, writer, late))
            yield partial(_then, partial(self._finished, writer, hashing))

    def _finished(self, writer: ShardWriter, hashing: Executor) -> None:
        """A shard is written: what remains to hash of it is hashed while the next one is."""
        writer.close()
        self.digests.append(hashing.submit(writer.digest))

    def _tiles(
        self, place: Place, writer: ShardWriter, opened: ExitStack, late: dict[str, memoryview]
    ) -> Iterator[_Task]:
        if not place.slot.length:
            return
        stored = yield from self._opened(place, opened)
        grid = place.grid

        def tile(start: int, stop: int, sampled: bool) -> _Chunk:
            made = self._in_flight.run(partial(stored.tile, start, stop, sampled))
            writer.write(place.slot.offset + made.offset, made.buffer)
            return _Chunk(writer, made.buffer, partial(self._made, stored, made._replace(buffer=_NOTHING)))

        for number, (start, stop) in enumerate(grid):
            yield partial(tile, start, stop, is_sampled(number, len(grid)))
        yield partial(_then, partial(self._stored, stored, writer, late))

    def _opened(self, place: Place, opened: ExitStack) -> Generator[_Task, None, Storing]:
        """The weight, open; where the device is short of memory, when all weights before it are closed."""
        import torch

        device, opening = self._in_flight.device, self._in_flight.opening
        try:
            with opening:
                return opened.enter_context(storing(place, device))
        except torch.OutOfMemoryError:
            pass
        for _ in range(self._window):  # whoever hands these on has handed on all that came before
            yield partial(_then, _nothing)
        self._in_flight.give_back()
        try:
            return opened.enter_context(storing(place, device))
        except torch.OutOfMemoryError as error:
            raise self._in_flight.too_small() from error

    def _made(self, stored: Storing, made: Made) -> None:
        stored.done(made)
        if made.overflown:
            self.overflown[stored.place.weight.name] = None

    def _stored(self, stored: Storing, writer: ShardWriter, late: dict[str, memoryview]) -> None:
        """All tiles of a weight are written: its statistics, and the tensors beside its codes."""
        if statistics := stored.statistics():
            self.statistics[stored.place.weight.name] = statistics
        slots = {slot.name: slot for slot in stored.place.others}
        for name, tensor in stored.finish().items():
            buffer, slot = as_bytes(tensor), slots[name]
            self._bar.advance(len(buffer))
            if slot.late:
                late[name] = buffer
                continue
            assert len(buffer) == slot.length, f"{name} has {len(buffer)} bytes, not {slot.length}"
            writer.write(slot.offset, buffer)

    def _complete(self, shard: PlannedShard, writer: ShardWriter, late: dict[str, memoryview]) -> None:
        """The late tensors one after the other, and the header that knows where they are."""
        slots = shard.slots
        end = next(slot.offset for slot in slots if slot.late)
        for slot in (slot for slot in slots if slot.late):
            assert len(late[slot.name]) <= slot.length
            writer.write(end, late[slot.name])
            end += len(late[slot.name])
        lengths = {name: len(buffer) for name, buffer in late.items()}
        self.num_bytes |= lengths
        writer.complete(shard.final_header(lengths), end)


_NOTHING = memoryview(b"")


def _nothing() -> None:
    pass


def _then(action: Callable[[], None]) -> Callable[[], None]:
    return action


def _copies(place: Place, writer: ShardWriter, opened: ExitStack) -> Iterator[_Task]:
    """The bytes of a weight as they stand in the base's files, whatever holds it."""
    source = place.weight.source
    entries = place.form.entries if isinstance(place.form, Held) else (source,)
    for entry, slot in zip(entries, place.slots, strict=True):
        assert entry is not None
        descriptor = opened.enter_context(entry.extent.file.opened())

        def copy(start: int, stop: int, entry: Entry, slot: Slot, descriptor: int) -> _Chunk:
            buffer = memoryview(bytearray(stop - start))
            read_into(descriptor, entry.extent.offset + start, buffer)
            if not writer.cloned:
                writer.write(slot.offset + start, buffer)
            return _Chunk(writer, buffer)

        for start in range(0, slot.length, _COPY_CHUNK):
            yield partial(copy, start, min(start + _COPY_CHUNK, slot.length), entry, slot, descriptor)
