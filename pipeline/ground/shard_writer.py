"""Writing a shard at final offsets, in any order; hashed meanwhile in file order, or at the end."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.ground.digests import Digest, sha256
from pipeline.ground.files import File, write_all

_FLUSHED = 256 << 20  # bytes after which the disk is set to work, so that little is left to sync in the end
_FICLONE = 0x40049409  # linux/fs.h: share all blocks of another file (btrfs, XFS, bcachefs, ZFS, NFS 4.2)


class ShardWriter:
    """A shard of known layout. `write` may be called from any thread; `hashed` in the order of the bytes.

    Bytes that are not made `in_order` are hashed by reading the file again.
    """

    def __init__(
        self, path: Path, header: bytes, size: int, same_as: File | None, in_order: bool = True
    ) -> None:
        self.path, self.size, self._in_order = path, size, in_order
        self._sha256, self._dirty = hashlib.sha256(header), 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.cloned = same_as is not None and self._clone(same_as)
        if not self.cloned:
            os.truncate(self._descriptor, self.size)
            write_all(self._descriptor, 0, memoryview(header))

    def _clone(self, original: File) -> bool:
        """Shares the blocks of a file with the very same layout, where the file system can."""
        with original.opened() as source:
            try:
                fcntl.ioctl(self._descriptor, _FICLONE, source)
            except OSError:
                return False
        return True

    def write(self, offset: int, buffer: memoryview) -> None:
        """Writes bytes at their place, counted from the start of the file."""
        write_all(self._descriptor, offset, buffer)

    def hashed(self, buffer: memoryview) -> None:
        """Takes the next bytes of the file into its hash."""
        if self._in_order:
            self._sha256.update(buffer)
        self._dirty += len(buffer)

    def flush(self) -> Callable[[], None] | None:
        """What brings the bytes so far to the disk, on any thread, when there are enough for it."""
        if self._dirty < _FLUSHED:
            return None
        self._dirty, descriptor = 0, os.dup(self._descriptor)

        def flushed() -> None:
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

        return flushed

    def digest(self) -> Digest:
        """What identifies the file, once all of it is written."""
        found = self._sha256.hexdigest() if self._in_order else sha256(File.at(self.path))
        return Digest(self.path.name, self.size, found)

    def complete(self, header: bytes, size: int) -> None:
        """Puts another header of the same length in place, for a file that became shorter than planned."""
        write_all(self._descriptor, 0, memoryview(header))
        os.truncate(self._descriptor, size)
        self.size = size

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
