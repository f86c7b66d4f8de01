"""A parameter that the adapter holds whole: modules_to_save, trained biases, saved or resized embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground.deltas.delta import Base, Delta, RowsOf
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.files import read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Saved(Delta):
    """The tensor of the file instead of the base's."""

    entry: Entry

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    @property
    def state_bytes(self) -> int:
        return 0  # it is read by rows

    def describe(self, factor: float) -> str:
        return "saved whole" + (f", times {factor:g}" if factor != 1 else "")

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        extent = self.entry.extent
        row = extent.length // max(self.num_rows, 1)
        with extent.file.opened() as descriptor:

            def rows(start: int, stop: int, W: Tensor) -> Tensor:
                raw = read_tensor(descriptor, extent.offset + start * row, (stop - start) * row, device)
                value = raw.view(torch_dtype(self.entry.dtype)).to(torch_dtype(dtype))
                return value.view(stop - start, prod(self.shape) // self.num_rows)

            yield rows
