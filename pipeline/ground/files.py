"""Bytes in files: where they lie, and reading them into buffers of our own (pread, never mmap)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.ground.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when the plan was made; `opened` holds a run to that."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def at(cls, path: Path) -> File:
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor for reading; PipelineError if the file is no longer what was planned with."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be opened any more: {error.strerror}") from error
        try:
            stat = os.fstat(descriptor)
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified_ns):
                raise PipelineError(f"{self.path}: changed while the run was using it; start again")
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of a file from `offset` on."""

    file: File
    offset: int
    length: int


def read_into(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fills the buffer with the bytes at `offset`; PipelineError if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise PipelineError(f"a file ended {len(buffer) - done} bytes early while it was being read")
        done += count


def read_tensor(descriptor: int, offset: int, length: int, device: str = "cpu") -> Tensor:
    """`length` bytes at `offset` as an uint8 tensor `(length,)` on the device, in memory of its own.

    On its way to a GPU it goes through pinned memory, which torch hands out again once the copy is done; the
    reader does not wait for that.
    """
    import torch

    pinned = device.startswith("cuda")
    buffer = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
    if length:
        read_into(descriptor, offset, memoryview(buffer.numpy()))
    return buffer.to(device, non_blocking=pinned)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in host memory; out of a GPU through pinned memory."""
    import torch

    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if not flat.is_cuda:
        return memoryview(flat.cpu().numpy())
    host, copied = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
    host.copy_(flat, non_blocking=True)
    copied.record(torch.cuda.current_stream(flat.device))
    copied.synchronize()  # this copy, not what other threads have put behind it
    return memoryview(host.numpy())


def write_all(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Writes the whole buffer at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)
