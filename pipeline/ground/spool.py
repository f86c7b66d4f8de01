"""Matrices put aside in files as they are made, to be read again by leading rows, or by the next run.

Each file is named by a key that says all that its numbers depend on. It holds float32 matrices one after the
other, then as JSON what there is to tell of them, the length of that, and the SHA-256 of it all. It gets its
name once it is on the disk: a run may end in any way and leaves whole files, and one that is not what was
written is found out by its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.ground.files import read_into, read_tensor, write_all

if TYPE_CHECKING:
    from torch import Tensor

_TAIL = struct.Struct("<Q32s")  # bytes of the JSON, and the hash of all before it
_LENGTH = struct.Struct("<Q")
_IN_THE_MAKING = "unfinished"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a float32 matrix lies."""

    key: str
    offset: int
    rows: int
    columns: int


class Spool:
    """`with Spool(folder, keys) as spool:`; files of other keys are removed, its own stay afterwards."""

    def __init__(self, folder: Path, keys: Collection[str]) -> None:
        self.folder, self._keys = folder, frozenset(keys)
        self.num_removed = 0  # files of other keys
        self._descriptor, self._key = -1, ""

    def __enter__(self) -> Spool:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in self._keys:
                path.unlink()
                self.num_removed += path.name != _IN_THE_MAKING
        _sync(self.folder.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            (self.folder / _IN_THE_MAKING).unlink(missing_ok=True)

    def keep(self, key: str, matrix: Tensor) -> Kept:
        """Appends a float32 matrix to the file of the key, the only one in the making."""
        import torch

        kept = Kept(key, self._append(key, b""), matrix.shape[0], matrix.shape[1])
        self._append(key, memoryview(matrix.contiguous().view(-1).view(torch.uint8).numpy()))
        return kept

    def finish(self, key: str, tell: Any) -> None:
        """Puts the file of the key in its place, on the disk; `tell` is JSON."""
        said = json.dumps(tell).encode()
        self._append(key, said)
        self._append(key, _LENGTH.pack(len(said)))
        write_all(self._descriptor, self._end, memoryview(self._sha256.digest()))
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        (self.folder / _IN_THE_MAKING).rename(self.folder / key)
        _sync(self.folder)

    def _append(self, key: str, buffer: bytes | memoryview) -> int:
        """Writes at the end; where that is."""
        if self._descriptor < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._descriptor = os.open(self.folder / _IN_THE_MAKING, flags, 0o600)
            self._key, self._end, self._sha256 = key, 0, hashlib.sha256()
        assert self._key == key, "one file at a time"
        start = self._end
        write_all(self._descriptor, start, memoryview(buffer))
        self._sha256.update(buffer)
        self._end += len(buffer)
        return start

    def told(self, key: str) -> Any:
        """What `finish` was told of a file that stands whole; None where none does."""
        return told(self.folder / key)

    def first(self, kept: Kept, rows: int) -> Tensor:
        """The leading rows of a finished file's matrix; rows of zeros below them where it has fewer."""
        import torch

        held = min(rows, kept.rows)
        descriptor = os.open(self.folder / kept.key, os.O_RDONLY)
        try:
            raw = read_tensor(descriptor, kept.offset, held * kept.columns * 4)
        finally:
            os.close(descriptor)
        values = raw.view(torch.float32).view(held, kept.columns)
        return torch.cat((values, values.new_zeros(rows - held, kept.columns))) if held < rows else values


def told(path: Path) -> Any:
    """What was told of the matrices in a file of a spool; None if it is not there, or not as written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        if size < _TAIL.size:
            return None
        tail = bytearray(_TAIL.size)
        read_into(descriptor, size - _TAIL.size, memoryview(tail))
        length, digest = _TAIL.unpack(tail)
        if _sha256(descriptor, size - len(digest)) != digest:
            return None
        said = bytearray(length)
        read_into(descriptor, size - _TAIL.size - length, memoryview(said))
    finally:
        os.close(descriptor)
    return json.loads(said)


def _sha256(descriptor: int, length: int) -> bytes:
    found, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for offset in range(0, length, _CHUNK):
        part = buffer[: min(_CHUNK, length - offset)]
        read_into(descriptor, offset, part)
        found.update(part)
    return found.digest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
