"""Where the scales of a weight lie: which scale holds for which rows and columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.ground.codes.reading import matrices

_USUAL = (128, 128)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where scales lie: matrices of `rows` rows, of `down` x `across` blocks of `height` x `width` each."""

    rows: int
    down: int
    across: int
    height: int
    width: int

    def line(self, row: int) -> int:
        """The line of scales that holds for a row of the weight."""
        return row // self.rows * self.down + row % self.rows // self.height


def fitted(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[tuple[int, int], ...], by_column: bool
) -> Grid | None:
    """The grid of scales of this shape, None if it is none; `by_column`: (E, K, 1) belong to columns."""
    outer, rows, columns = matrices(shape)
    if all(size == 1 for size in scales):
        return Grid(outer * rows, 1, 1, outer * rows, columns)
    if scales[: len(shape) - 2] != shape[:-2]:
        return None
    rest = scales[len(shape) - 2 :]
    if all(size == 1 for size in rest):
        return Grid(rows, 1, 1, rows, columns)
    if rest == (1, columns) or (by_column and rest == (columns, 1)):
        return Grid(rows, 1, columns, rows, 1)
    if rest in ((rows,), (rows, 1)):
        return Grid(rows, rows, 1, 1, columns)
    for height, width in blocks:
        if rest == (-(-rows // height), -(-columns // width)):
            return Grid(rows, *rest, min(height, rows), min(width, columns))
    return None


def told_blocks(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The blocks of floats that a config tells of: the whole checkpoint's, or compressed-tensors' groups'."""
    told = [config.get("weight_block_size")]
    for group in _tables(config.get("config_groups")):
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("type") != "int":
            told += [weights.get("block_structure"), [1, weights.get("group_size")]]
    return tuple(dict.fromkeys(block for block in map(_block, told) if block)) or (_USUAL,)


def _tables(table: Any) -> Iterator[Mapping[str, Any]]:
    """The tables in a table, of which nothing is known."""
    if isinstance(table, dict):
        yield from (value for value in table.values() if isinstance(value, dict))


def _block(told: Any) -> tuple[int, int] | None:
    """[128, 128] or "128x128"; None for anything else."""
    sizes = told.split("x") if isinstance(told, str) else told
    if not isinstance(sizes, list | tuple) or not all(str(size).isdecimal() for size in sizes):
        return None
    return (
        (int(sizes[0]), int(sizes[1])) if len(sizes) == 2 and all(int(size) > 0 for size in sizes) else None
    )
