"""Two tensors of files held against each other, byte for byte, without torch."""

from __future__ import annotations

from math import prod
from typing import Any

from pipeline.ground.files import read_into
from pipeline.ground.shards import Entry

_CHUNK = 1 << 24  # bytes


def same_values(one: Entry, other: Entry) -> bool:
    """Whether they have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.extent.length or not other.extent.length:  # empty, or planned and not there yet
        return not prod(one.shape)
    length = one.extent.length
    with one.extent.file.opened() as left, other.extent.file.opened() as right:
        return all(
            _bytes(left, one, start, min(start + _CHUNK, length))
            == _bytes(right, other, start, min(start + _CHUNK, length))
            for start in range(0, length, _CHUNK)
        )


def is_transpose(one: Entry, other: Entry) -> bool:
    """Whether one matrix is the other transposed, of the same dtype; both are read whole."""
    import numpy

    if one.dtype != other.dtype or one.shape != other.shape[::-1]:
        return False
    return bool(numpy.array_equal(_matrix(one), _matrix(other).T))


def _matrix(entry: Entry) -> Any:
    import numpy

    with entry.extent.file.opened() as descriptor:
        buffer = _bytes(descriptor, entry, 0, entry.extent.length)
    return numpy.frombuffer(buffer, f"u{len(buffer) // max(prod(entry.shape), 1)}").reshape(entry.shape)


def _bytes(descriptor: int, entry: Entry, start: int, stop: int) -> bytearray:
    buffer = bytearray(stop - start)
    read_into(descriptor, entry.extent.offset + start, memoryview(buffer))
    return buffer
