"""What every adapter kind gives: the rows of what it adds to one weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

RowsOf = Callable[[int, int], "Tensor"]  # rows(start, stop) gives the delta's rows start:stop


@dataclass(frozen=True)
class Delta(ABC):
    """What one adapter adds to the weight of one module; `shape` is (out_features, in_features)."""

    module: str
    parameter: str
    shape: tuple[int, ...]

    @property
    def grain(self) -> int:
        """Rows that must be computed together."""
        return 1

    @property
    @abstractmethod
    def entries(self) -> tuple[Entry, ...]:
        """The adapter tensors that this delta uses, each of them wholly."""

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank delta."""
        return None

    @abstractmethod
    def describe(self, factor: float) -> str:
        """A few words: LoRA rank 8 scale 2."""

    @abstractmethod
    def open(self, device: str, dtype: str, factor: float) -> AbstractContextManager[RowsOf]:
        """Rows `(stop - start, in_features)` of factor * delta, in `dtype` (F32 or F64) on `device`."""
