"""Bytes of the tensors that hold one weight, as a decoder asks for them, and the sentences of a finder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Found
from pipeline.ground.errors import Refused
from pipeline.ground.files import read_into, read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1 << 20  # bytes, of what is read while a run is planned
Bytes = Callable[[int, int], "Tensor"]  # read(start, stop): those bytes of a tensor, uint8, on the device


@contextmanager
def reading(device: str, *entries: Entry) -> Iterator[tuple[Bytes, ...]]:
    """A reader for each tensor, each file opened once."""
    with ExitStack() as stack:
        files = {entry.extent.file for entry in entries}
        descriptors = {file: stack.enter_context(file.opened()) for file in files}

        def read(entry: Entry, start: int, stop: int) -> Tensor:
            assert 0 <= start <= stop <= entry.extent.length
            extent = entry.extent
            return read_tensor(descriptors[extent.file], extent.offset + start, stop - start, device)

        yield tuple(partial(read, entry) for entry in entries)


def read_small(entry: Entry) -> bytes:
    """The bytes of a small tensor, without torch; Refused if it is a large one."""
    if entry.extent.length > _SMALL:
        raise refusal(entry, f"has {entry.extent.length} bytes where a few are expected")
    buffer = bytearray(entry.extent.length)
    with entry.extent.file.opened() as descriptor:
        read_into(descriptor, entry.extent.offset, memoryview(buffer))
    return bytes(buffer)


def num_bytes(entry: Entry) -> int:
    """Bytes of one of its elements, which are whole bytes."""
    return entry.extent.length // max(prod(entry.shape), 1)


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(matrices, rows of each, columns) of a weight of two dimensions or more: (E, N, K) has E matrices."""
    return prod(shape[:-2]), shape[-2], shape[-1]


def refusal(entry: Entry, reason: str) -> Refused:
    """The sentence that names a tensor and its file, for raising."""
    return Refused(f"{entry.extent.file.path}: '{entry.name}' {reason}")


def told(entry: Entry) -> str:
    """A tensor's dtype and shape: F32 [4, 2]."""
    return f"{entry.dtype} {list(entry.shape)}"


def each(entries: Iterable[Entry], found: Callable[[Entry], Found | None]) -> Iterator[Found]:
    """What `found` makes of every tensor; all that it refuses is refused together, at the end."""
    wrong: list[Refused] = []
    for entry in entries:
        try:
            one = found(entry)
        except Refused as refused:
            wrong.append(refused)
            continue
        if one is not None:
            yield one
    if wrong:
        raise Refused.together(wrong)
