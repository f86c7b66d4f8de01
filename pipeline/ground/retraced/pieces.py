"""A module's change brought to where it lies in a weight: turned, folded, cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.formulas.module import Change, Parameter, Rows
from pipeline.ground.retraced.adapter import Piece

if TYPE_CHECKING:
    from torch import Tensor


class Area(NamedTuple):
    """Rows row:stop and columns column:end of a weight's matrix."""

    row: int
    stop: int
    column: int
    end: int

    @property
    def size(self) -> int:
        return (self.stop - self.row) * (self.end - self.column)


def area_of(piece: Piece) -> Area:
    """Where it lies; a row of a kernel is as many rows of the weight as its dimensions between are."""
    place, fold = piece.place, _fold(piece)
    height, width = (place.rows[1] - place.rows[0]) * fold, place.matrix[1] // fold
    return Area(place.row, place.row + height, place.column, place.column + width)


def _fold(piece: Piece) -> int:
    dims = piece.place.dims
    return 1 if piece.place.stack else prod(dims[1:-1])


def change_on(piece: Piece, base: Rows) -> Change:
    """What it adds to rows of its area; `base` gives rows of the weight in any float dtype."""
    place, area, fold = piece.place, area_of(piece), _fold(piece)
    first, columns = place.rows[0], slice(area.column, area.end)

    def lying(start: int, stop: int) -> Tensor:
        rows = base(*(area.row + (row - first) * fold for row in (start, stop)))
        return rows[:, columns].double().reshape(stop - start, -1)

    dims, shape = place.dims, place.matrix
    if place.turned:
        dims, shape = dims[::-1], shape[::-1]
    rows = _turned(lying, shape[1]) if place.turned else lying
    change = piece.formula(piece.module, Parameter(dims, shape, rows, lambda: base(0, 1).dtype))

    def laid(rows: Rows, times: float) -> Rows:
        as_it_lies = _turned(rows, shape[0]) if place.turned else rows

        def of_weight(start: int, stop: int) -> Tensor:
            low, high = start - area.row, stop - area.row
            begin, end = low // fold, -(-high // fold)
            folded = as_it_lies(first + begin, first + end).reshape(-1, area.end - area.column)
            return scaled(folded[low - begin * fold : high - begin * fold], times)

        return of_weight

    size = laid(change.size, abs(piece.times)) if change.size else None
    return Change(laid(change.rows, piece.times), size)


def scaled(rows: Tensor, factor: float) -> Tensor:
    """factor * rows; the rows themselves where that is 1."""
    return rows if factor == 1 else rows * factor


def _turned(rows: Rows, count: int) -> Rows:
    """Rows of the transpose, for which all `count` rows are computed, once."""
    whole: Callable[[], Tensor] = cache(lambda: rows(0, count).T.contiguous())
    return lambda start, stop: whole()[start:stop]
