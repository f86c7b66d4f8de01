"""A weight whose adapters are combined in another way than by their sum (merge=ties and its like)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.ground import tiles
from pipeline.ground.combining import Combination
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.selecting import Spot
from pipeline.merging.pieces import Merged, Piece, Placed
from pipeline.weight import Tile, Tiles

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Combined(Merged):
    """base with what a combination makes of its adapters' deltas on all of the weight.

    A delta that gives a value takes part with its change, value - W. The combination is computed in float32,
    or in float64 where that is the arithmetic.
    """

    combination: Combination

    @property
    def bytes_per_element(self) -> int:
        wide = 8 if self.arithmetic == "F64" else 4
        return 2 * wide * len(self.parts) + 4 * wide + 16  # each delta and its ballot; one delta in float64

    @property
    def state_bytes(self) -> int:
        rows = min(tiles.tile_rows(self.num_columns, self.grain), self.num_rows)
        tile = rows * self.num_columns * self.bytes_per_element
        return super().state_bytes + self.combination.state_bytes(len(self.parts), tile)

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        import torch

        device = "cpu" if device.startswith("mps") else device  # which has no float64
        kind = torch_dtype(self.arithmetic)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        with ExitStack() as stack:
            base = stack.enter_context(self.base.open(device))

            def opened(placed: Placed) -> Piece:
                return stack.enter_context(replace(placed, factor=1.0).open(device, "F64", self._rows(base)))

            pieces = [[(p, opened(p)) for p in own] for own in self.parts.values()]

            def deltas(start: int, stop: int, before: Tensor) -> Iterator[Tensor]:
                return (_whole(own, start, stop, before) for own in pieces)

            def seen(start: int, stop: int) -> Iterator[Tensor]:
                return (delta.float() for delta in deltas(start, stop, base(start, stop).value))

            grid = list(tiles.grid(self.num_rows, self.num_columns, self.grain))
            combine = self.combination.open(self._spots(), grid, seen)

            def tile(start: int, stop: int) -> Tile:
                before = base(start, stop).value
                delta = combine(start, deltas(start, stop, before), wide).to(kind)
                return Tile(before.to(kind) + delta, before, delta)

            yield tile

    def _spots(self) -> list[Spot]:
        return [
            Spot(self.name, number, own[0].factor, self.num_columns, _reached(own))
            for number, own in self.parts.items()
        ]


def _reached(pieces: list[Placed]) -> int:
    """Elements of the weight that an adapter's pieces lie on."""
    areas = {(p.row, p.stop, p.column, p.width) for p in pieces}
    return sum((stop - row) * width for row, stop, _, width in areas)


def _whole(pieces: list[tuple[Placed, Piece]], start: int, stop: int, before: Tensor) -> Tensor:
    """Rows start:stop of one adapter's delta in float64, `before` the weight's; 0 where it does not reach."""
    import torch

    total: Tensor | None = None
    for placed, piece in pieces:
        low, high = max(start, placed.row), min(stop, placed.stop)
        if low >= high:
            continue
        where = slice(low - start, high - start), slice(placed.column, placed.column + placed.width)
        W = before[where]
        part = piece(low, high, W)
        part = part - W if placed.delta.replaces else part
        if total is None and part.shape == before.shape:
            total = part
            continue
        total = before.new_zeros(before.shape, dtype=torch.float64) if total is None else total.clone()
        total[where] += part
    return before.new_zeros(before.shape, dtype=torch.float64) if total is None else total
