"""A vector that is added to a bias: lora_bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Vector(Delta):
    """scale * the tensor `(n,)`."""

    entry: Entry
    scale: float

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    def describe(self, factor: float) -> str:
        return f"bias scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        value = read_entry(self.entry, device, dtype).view(1, -1) * (self.scale * factor)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return value

        yield rows
