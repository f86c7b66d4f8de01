"""A GGUF tensor as a weight's codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Rows
from pipeline.ground.codes.gguf import decode
from pipeline.ground.files import read_tensor
from pipeline.ground.gguf_names import Transform
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GgufCode(Code):
    """A GGUF tensor: rows of blocks, and what is to be done with them once decoded."""

    entry: Entry
    transform: Transform | None = None

    @property
    def describe(self) -> str:
        return self.entry.dtype

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    @property
    def grain(self) -> int:
        return self.transform.grain if self.transform else 1

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        extent = self.entry.extent
        num_rows = prod(self.shape[:-1]) if len(self.shape) > 1 else 1
        size = extent.length // max(num_rows, 1)
        with extent.file.opened() as descriptor:

            def rows(start: int, stop: int) -> Tensor:
                raw = read_tensor(descriptor, extent.offset + start * size, (stop - start) * size, device)
                value = decode(self.entry.dtype, raw.view(stop - start, size))
                return self.transform(value) if self.transform else value

            yield rows
