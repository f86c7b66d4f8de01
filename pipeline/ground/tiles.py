"""The grid on which weights are cut: it depends on the shape alone, so that the bytes do too."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

TILE_ELEMENTS = (
    1 << 18
)  # half a megabyte of bf16, one of float32: a tile and its parts stay in a core's cache


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight: rows run over all sides but the last; 0-d and 1-d weights are one row."""
    return (prod(shape[:-1]) if len(shape) > 1 else 1), (shape[-1] if shape else 1)


def tile_rows(num_columns: int, grain: int) -> int:
    """Rows of a tile: about TILE_ELEMENTS elements, a multiple of the grain."""
    return max(TILE_ELEMENTS // max(num_columns, 1) // grain, 1) * grain


def grid(num_rows: int, num_columns: int, grain: int) -> Iterator[tuple[int, int]]:
    """The row ranges (start, stop) of a weight's tiles, in order."""
    rows = tile_rows(num_columns, grain)
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


def num_tiles(num_rows: int, num_columns: int, grain: int) -> int:
    """How many tiles `grid` gives."""
    return -(-num_rows // tile_rows(num_columns, grain))
