"""DoRA: value = m / ||W + D|| * (W + D), a norm for each output (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground import tiles
from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dora(Delta):
    """A LoRA and its magnitude, one number for each output: a row, or a column of what lies transposed.

    Column norms take one pass over the base before the first row is given; they are summed in float64.
    """

    lora: Lora
    magnitude: Entry

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (*self.lora.entries, self.magnitude)

    @property
    def rank(self) -> int:
        return self.lora.rank

    def describe(self, factor: float) -> str:
        return f"DoRA rank {self.rank} scale {self.lora.scale:g}" + (
            f" times {factor:g}" if factor != 1 else ""
        )

    def on(self, shape: tuple[int, ...]) -> Dora:
        return replace(self, shape=shape, lora=self.lora.on(shape))

    def turned(self) -> Dora:
        return replace(self, shape=self.shape[::-1], lora=self.lora.turned())

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        kind = torch_dtype(dtype)
        m = read_entry(self.magnitude, device, dtype).flatten()
        with self.lora.open(device, dtype, 1.0, base) as delta:
            if self.lora.transposed:
                m = m / self._column_norms(delta, base, device).to(kind)

            def rows(start: int, stop: int, W: Tensor) -> Tensor:
                value = W.to(kind) + delta(start, stop, W)
                if self.lora.transposed:
                    return value * m
                return (m[start:stop] / value.norm(dim=1)).view(-1, 1) * value

            yield rows

    def _column_norms(self, delta: RowsOf, base: Base, device: str) -> Tensor:
        import torch

        squares = torch.zeros(self.num_columns, dtype=torch.float64, device=device)
        for start, stop in tiles.grid(self.num_rows, self.num_columns, 1):
            W = base(start, stop)
            D = delta(start, stop, W)
            squares += (W.to(D.dtype) + D).double().square().sum(0)
        return squares.sqrt()
