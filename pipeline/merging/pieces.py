"""Weights that an adapter changes: deltas cut into pieces, bound to places, summed onto the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from pipeline.ground.combining import ordered_sum
from pipeline.ground.deltas.delta import Base, Delta
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry
from pipeline.weight import Dense, Tile, Tiles, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FromAdapter(Weight):
    """A weight that the adapter holds whole and the base does not have, or not in this shape."""

    entry: Entry

    @property
    def stored_as(self) -> str:
        return self.entry.dtype

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        with Dense(self.name, self.shape, self.entry.dtype, self.entry).open(device) as tiles:
            yield tiles


Piece = Callable[[int, int, "Tensor"], "Tensor"]  # piece(start, stop, W): see Placed.open


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece of a delta bound to a place of a weight, with the factor that the recipe gives its adapter.

    The weight is meant as the matrix of its rows; the piece is rows `rows` of the delta's matrix and lies
    at (row, column) of it. A row of a kernel's delta is `fold` rows of the weight.
    """

    delta: Delta
    factor: float
    rows: tuple[int, int]
    row: int = 0
    column: int = 0
    fold: int = 1
    part: int = 0  # which of the adapters it is of

    @property
    def stop(self) -> int:
        """The weight's row where it ends."""
        return self.row + (self.rows[1] - self.rows[0]) * self.fold

    @property
    def width(self) -> int:
        """The weight's columns that it takes."""
        return self.delta.num_columns // self.fold

    @property
    def grain(self) -> int:
        """Rows of the weight that must stay together."""
        return self.delta.grain * self.fold

    def describe(self) -> str:
        """The delta in a few words: LoRA rank 8 scale 2."""
        return self.delta.describe(self.factor)

    @contextmanager
    def open(self, device: str, dtype: str, base: Base) -> Iterator[Piece]:
        """piece(start, stop, W): what the delta makes of rows start:stop of the weight, W its part of them.

        `base(start, stop)` gives whole rows of the unmerged weight.
        """
        first, columns = self.rows[0], slice(self.column, self.column + self.width)

        def of_base(start: int, stop: int) -> Tensor:
            begin, end = (self.row + (r - first) * self.fold for r in (start, stop))
            return base(begin, end)[:, columns].reshape(stop - start, -1)

        with self.delta.open(device, dtype, self.factor, of_base) as rows:

            def piece(start: int, stop: int, W: Tensor) -> Tensor:
                begin, end = (first + (r - self.row) // self.fold for r in (start, stop))
                return rows(begin, end, W.reshape(end - begin, -1)).reshape(stop - start, self.width)

            yield piece


@dataclass(frozen=True)
class Merged(Weight):
    """base with its deltas, in the dtype `arithmetic`; rounding is left to whoever saves it.

    Deltas that add are summed before they are added. One that gives a value stands alone in its place; a
    factor other than 1 moves that far from the base towards it. The order of the adapters changes no bit.
    """

    base: Weight
    placed: tuple[Placed, ...]
    arithmetic: str

    @property
    def stored_as(self) -> str:
        return self.base.stored_as

    @property
    def state_bytes(self) -> int:
        return self.base.state_bytes + sum(placed.delta.state_bytes for placed in self.placed)

    @property
    def grain(self) -> int:
        return lcm(self.base.grain, *(placed.grain for placed in self.placed))

    @property
    def parts(self) -> dict[int, list[Placed]]:
        """The pieces of each adapter."""
        numbers = dict.fromkeys(placed.part for placed in self.placed)
        return {number: [p for p in self.placed if p.part == number] for number in numbers}

    @property
    def bytes_per_element(self) -> int:
        """Memory that a tile takes while it is computed, for each of its elements."""
        wide, num_parts = 8 if self.arithmetic == "F64" else 4, len(self.parts)
        return 3 * wide + 4 + (wide * (num_parts + 2) if num_parts > 1 else 0)

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        kind = torch_dtype(self.arithmetic)
        wide = self.arithmetic if self.arithmetic == "F64" else "F32"
        with ExitStack() as stack:
            base = stack.enter_context(self.base.open(device))
            pieces = [(p, stack.enter_context(p.open(device, wide, self._rows(base)))) for p in self.placed]
            apart = len(self.parts) > 2  # a sum of two has no order

            def tile(start: int, stop: int) -> Tile:
                before = base(start, stop).value
                deltas: dict[int, Tensor] = {}
                values = []
                for placed, piece in pieces:
                    low, high = max(start, placed.row), min(stop, placed.stop)
                    if low >= high:
                        continue
                    where = (
                        slice(low - start, high - start),
                        slice(placed.column, placed.column + placed.width),
                    )
                    W = before[where]
                    part = piece(low, high, W).to(kind)
                    if placed.delta.replaces:
                        part, value = _moved(W.to(kind), part, placed.factor)
                        values.append((where, value))
                    number = placed.part if apart else 0
                    delta = deltas.get(number)
                    deltas[number] = (
                        part
                        if delta is None and part.shape == before.shape
                        else _added(delta, part, where, before)
                    )
                delta = (
                    ordered_sum([deltas.pop(number) for number in list(deltas)])
                    if deltas
                    else before.new_zeros(before.shape, dtype=kind)
                )
                merged = before.to(kind) + delta
                for where, value in values:
                    merged[where] = value
                return Tile(merged, before, delta)

            yield tile

    def _rows(self, tiles: Tiles) -> Base:
        """Any rows of the base, by tiles that begin where it can be cut."""

        def rows(start: int, stop: int) -> Tensor:
            begin, grain = start // self.base.grain * self.base.grain, self.base.grain
            end = min(-(-stop // grain) * grain, self.num_rows)
            return tiles(begin, end).base[start - begin : stop - begin]

        return rows


def _moved(W: Tensor, value: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(change, value) of a delta that gives a value, taken `factor` of the way."""
    change = value - W
    return (change, value) if factor == 1 else (change * factor, W + change * factor)


def _added(delta: Tensor | None, part: Tensor, where: tuple[slice, slice], like: Tensor) -> Tensor:
    total = like.new_zeros(like.shape, dtype=part.dtype) if delta is None else delta.clone()
    total[where] += part
    return total
