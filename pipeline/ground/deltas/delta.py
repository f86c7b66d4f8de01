"""What every adapter kind gives: rows of what it makes of one parameter of one module.

A parameter is spoken of as a matrix `(rows, columns)`: kernels `(out, in * k * k)`, experts
`(experts * d1, d2)`, a vector `(1, n)`. Most kinds add to it; some give the new value, which depends on
the base (DoRA, IA3, OFT) or replaces it (saved modules).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Self

from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.files import read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

Base = Callable[[int, int], "Tensor"]  # base(start, stop): the unmerged parameter's rows, any float dtype
RowsOf = Callable[[int, int, "Tensor"], "Tensor"]  # rows(start, stop, W): see Delta.open

UNKNOWN = -1  # a size that the adapter's tensors do not tell


@dataclass(frozen=True)
class Delta(ABC):
    """What one adapter makes of one parameter; `shape` is the parameter's, UNKNOWN where it cannot tell."""

    module: str
    parameter: str
    shape: tuple[int, ...]

    replaces: ClassVar[bool] = False
    """Whether `rows` gives the new value instead of what is added."""

    @property
    def num_rows(self) -> int:
        """Rows of the matrix: the out-features of a kernel, all rows of all experts, one for a vector."""
        if len(self.shape) < 2:
            return 1
        return self.shape[0] * self.shape[1] if len(self.shape) == 3 and self.stacked else self.shape[0]

    @property
    def num_columns(self) -> int:
        """Columns of the matrix."""
        return prod(self.shape) // max(self.num_rows, 1)

    @property
    def stacked(self) -> bool:
        """Whether three dimensions mean a stack of matrices (experts) and not a kernel."""
        return False

    @property
    def grain(self) -> int:
        """Rows of the matrix that must be computed together."""
        return 1

    @property
    @abstractmethod
    def entries(self) -> tuple[Entry, ...]:
        """The adapter tensors that this delta uses, each of them wholly."""

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank delta."""
        return None

    @property
    def state_bytes(self) -> int:
        """Memory that `open` holds while tiles are computed."""
        return sum(prod(entry.shape) * 8 for entry in self.entries)

    @property
    def optional(self) -> bool:
        """Whether a base without this parameter has nothing to change: the bias that IA3 scales."""
        return False

    @abstractmethod
    def describe(self, factor: float) -> str:
        """A few words: LoRA rank 8 scale 2."""

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it cannot change a parameter of this shape, in a few words; None where it can."""
        seen = shape if len(shape) == len(self.shape) else (*shape[:1], prod(shape[1:]))  # kernels
        fits = len(seen) == len(self.shape) and all(
            a in (UNKNOWN, b) for a, b in zip(self.shape, seen, strict=True)
        )
        return None if fits else f"was made for a weight {list(self.shape)}"

    def on(self, shape: tuple[int, ...]) -> Self:
        """The same for a parameter of this shape, of which `misfit` found nothing."""
        return replace(self, shape=shape)

    def turned(self) -> Delta:
        """The same for a parameter that lies transposed (Conv1D of GPT-2, experts as (in, out))."""
        return Turned(self.module, self.parameter, (*self.shape[:-2], self.shape[-1], self.shape[-2]), self)

    def among(self, deltas: Sequence[Delta]) -> Self:
        """The same, knowing all of its adapter's deltas, itself too, each `on` its parameter.

        For what they share and the file does not hold: VeRA's projection is as large as the largest of them.
        """
        return self

    @abstractmethod
    def open(self, device: str, dtype: str, factor: float, base: Base) -> AbstractContextManager[RowsOf]:
        """rows(start, stop, W) in `dtype` (F32 or F64) on `device`: factor * delta, or the new value.

        W `(stop - start, columns)` holds the base's rows as they are, in any float dtype; `base` gives any
        rows of it, for what needs to see them all beforehand (a column norm). The factor is for kinds that
        add; who gives a value ignores it.
        """


@dataclass(frozen=True)
class Turned(Delta):
    """Any delta on a transposed parameter, computed whole, since its rows are the delta's columns."""

    plain: Delta

    @property
    def replaces(self) -> bool:  # type: ignore[override]
        return self.plain.replaces

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.plain.entries

    @property
    def rank(self) -> int | None:
        return self.plain.rank

    @property
    def state_bytes(self) -> int:
        return self.plain.state_bytes + 3 * 8 * prod(self.shape)

    def describe(self, factor: float) -> str:
        return self.plain.describe(factor)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.plain.misfit((*shape[:-2], shape[-1], shape[-2]))

    def on(self, shape: tuple[int, ...]) -> Turned:
        plain = self.plain.on((*shape[:-2], shape[-1], shape[-2]))
        return replace(self, shape=shape, plain=plain)

    def turned(self) -> Delta:
        return self.plain

    def among(self, deltas: Sequence[Delta]) -> Turned:
        plain = [delta.plain if isinstance(delta, Turned) else delta for delta in deltas]
        return replace(self, plain=self.plain.among(plain))

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        if len(self.shape) != 2:
            raise AssertionError("a stack of matrices turns by its own kind")
        W = base(0, self.shape[0]).T.contiguous()
        with self.plain.open(device, dtype, factor, lambda start, stop: W[start:stop]) as rows:
            whole = rows(0, W.shape[0], W).T
        yield lambda start, stop, _: whole[start:stop].contiguous()


def read_entry(entry: Entry, device: str = "cpu", dtype: str | None = None) -> Tensor:
    """An adapter's tensor with its file's values, in `dtype` where one is given."""
    with entry.extent.file.opened() as descriptor:
        raw = read_tensor(descriptor, entry.extent.offset, entry.extent.length, device)
    value = raw.view(torch_dtype(entry.dtype)).view(entry.shape)
    return value.to(torch_dtype(dtype)) if dtype else value
