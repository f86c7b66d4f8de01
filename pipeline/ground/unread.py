"""Weights that are read from files when their values are needed, and let go again.

A cell is a weight of a file, or what a loader makes of some: experts stacked, a matrix transposed. What was
done to them while the model was loaded is remembered and done again on the values each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.tiles import as_matrix, grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Unread:
    """A weight in a file; `open` gives its rows start:stop as `(rows, columns)`, decoded."""

    shape: tuple[int, ...]
    grain: int  # rows that must be read together
    dtype: str  # that its values get, as torch calls it: float32, int64
    open: Callable[[], AbstractContextManager[Callable[[int, int], Tensor]]]

    @property
    def num_rows(self) -> int:
        return as_matrix(self.shape)[0]

    @property
    def num_columns(self) -> int:
        return as_matrix(self.shape)[1]

    def fill(self, out: Tensor) -> None:
        """Reads it into a tensor of its shape, tile by tile."""
        into = out if out.dim() == 2 else out.view(self.num_rows, self.num_columns)
        with self.open() as rows:
            for start, stop in grid(self.num_rows, self.num_columns, self.grain):
                into[start:stop].copy_(rows(start, stop))

    def rows(self, wanted: Sequence[int]) -> Tensor:
        """These rows of a matrix, in this order."""
        import torch

        out = torch.empty((len(wanted), self.num_columns), dtype=getattr(torch, self.dtype))
        with self.open() as rows:
            for place, row in enumerate(wanted):
                start = row // self.grain * self.grain
                out[place].copy_(rows(start, min(start + self.grain, self.num_rows))[row - start])
        return out


@dataclass(frozen=True)
class Applied:
    """A function of torch, arguments with cells among them, and which of its results is meant."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    index: int | None = None


@dataclass(eq=False)
class Cell:
    """What tensors share that stand for the same values."""

    stream: Stream
    made: Unread | Applied
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    resident: Tensor | None = None  # values that were written over it, and stay

    @property
    def num_bytes(self) -> int:
        width: int = self.dtype.itemsize
        return prod(self.shape) * width

    @property
    def extra_bytes(self) -> int:
        """Memory beside its own that reading it takes: for what it is computed from."""
        if isinstance(self.made, Unread) or _is_joined(self.made):
            return 0
        found: list[Cell] = []
        replaced((self.made.args, self.made.kwargs), found.append)
        return sum(cell.num_bytes + cell.extra_bytes for cell in found)

    def values(self) -> Tensor:
        """Its values on the CPU, in memory of their own."""
        import torch

        if self.resident is not None:
            return self.resident
        if isinstance(self.made, Unread) or _is_joined(self.made):
            out = torch.empty(self.shape, dtype=self.dtype)
            self.fill(out)
            return out
        args, kwargs = replaced((self.made.args, self.made.kwargs), Cell.values)
        result = self.made.function(*args, **kwargs)
        value: Tensor = result if self.made.index is None else result[self.made.index]
        return value

    def fill(self, out: Tensor) -> None:
        """Reads it into a tensor of its shape; what is joined goes part by part, without another copy."""
        made = self.made
        if self.resident is None and isinstance(made, Unread) and (out.dim() == 2 or out.is_contiguous()):
            made.fill(out)
        elif self.resident is None and isinstance(made, Applied) and _is_joined(made):
            for part, place in _places(made, out):
                part.fill(place) if isinstance(part, Cell) else place.copy_(part)
        else:
            out.copy_(self.values())


def _is_joined(made: Applied) -> bool:
    import torch

    return made.function in (torch.stack, torch.cat) and len(made.args) <= 2 and made.kwargs.keys() <= {"dim"}


def _places(made: Applied, out: Tensor) -> Iterator[tuple[Cell | Tensor, Tensor]]:
    """The parts that are stacked or concatenated, each with its place in the result."""
    import torch

    dim = made.args[1] if len(made.args) > 1 else made.kwargs.get("dim", 0)
    start = 0
    for number, part in enumerate(made.args[0]):
        if made.function is torch.stack:
            yield part, out.select(dim, number)
        else:
            yield part, out.narrow(dim, start, part.shape[dim])
            start += part.shape[dim]


def replaced(value: Any, change: Callable[[Cell], Any]) -> Any:
    """The same nest of lists, tuples and tables with something else for each cell."""
    if isinstance(value, Cell):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([replaced(v, change) for v in value])
    if isinstance(value, dict):
        return {k: replaced(v, change) for k, v in value.items()}
    return value


@dataclass
class Stream:
    """The weights of a model: which are held at the moment, and how many bytes of them may be."""

    room: int = 0  # bytes; one weight is held in any case
    deferring: bool = False  # while a model is loaded: functions are remembered, not called
    held: OrderedDict[Cell, Tensor] = field(default_factory=OrderedDict)
    most: int = 0  # bytes held at one time so far
    read: int = 0  # bytes of values read so far

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While this lasts, functions of deferred tensors give deferred tensors."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def drop(self) -> None:
        """Lets go of everything that was read."""
        self.held.clear()

    def values(self, cell: Cell) -> Tensor:
        """The values, read anew where they are not held; those not asked for the longest make room."""
        if cell.resident is not None:
            return cell.resident
        if (found := self.held.get(cell)) is not None:
            self.held.move_to_end(cell)
            return found
        while self.held and self._bytes() + cell.num_bytes > self.room:
            self.held.popitem(last=False)
        self.held[cell] = found = cell.values().to(cell.device)
        self.read += cell.num_bytes
        self.most = max(self.most, self._bytes())
        return found

    def _bytes(self) -> int:
        return sum(cell.num_bytes for cell in self.held)
