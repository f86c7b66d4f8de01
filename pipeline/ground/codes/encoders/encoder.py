"""How the rows of a weight become codes: the tensors that will hold it, and their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pipeline.ground import dtypes
from pipeline.ground.codes.code import Code

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of those that hold a weight.

    A `late` one is bytes of which only the most is known beforehand; it lies behind all others of its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    late: bool = False

    @property
    def num_bytes(self) -> int:
        found = dtypes.num_bytes(self.dtype, self.shape)
        assert found is not None
        return found


class Encoded(NamedTuple):
    """Some rows as codes: bytes of the first part, and what `finish` makes the other parts of."""

    codes: Tensor
    sides: tuple[Tensor, ...]


Encode = Callable[["Tensor", int, "int | None"], Encoded]
"""encode(rows, start, stream): rows `(rows, columns)` float32 from `start`, a multiple of the grain.

A pure function of them; by chance with the bits of the stream where one is given. Any thread may call it.
"""


@dataclass(frozen=True)
class Encoder(ABC):
    """The codes of one weight to be written; frozen and picklable. `shape` is the dense weight's."""

    name: str
    shape: tuple[int, ...]

    by_chance: ClassVar[bool] = False
    """Whether it can round stochastically."""
    gathers: ClassVar[bool] = True
    """Whether `finish` needs the sides."""
    blur: ClassVar[float] = 0.0
    """By which share of a row's largest value rows are rounded before they are encoded."""

    @property
    @abstractmethod
    def describe(self) -> str:
        """What people call it, as `Code.describe`."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The tensors, codes first: their bytes lie in the order of the rows."""

    @property
    def grain(self) -> int:
        """Rows that must be encoded together."""
        return 1

    @property
    def state_bytes(self) -> int:
        """Memory for what is kept until `finish`."""
        return sum(part.num_bytes for part in self.parts[1:])

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    def offset(self, row: int) -> int:
        """Bytes of codes before a row."""
        return self.parts[0].num_bytes * row // self.num_rows

    @abstractmethod
    def open(self, device: str) -> AbstractContextManager[Encode]:
        """Encoding on the device."""

    @abstractmethod
    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        """The rows that the codes mean, `(rows, columns)` float32, before scales are quantized too."""

    @abstractmethod
    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """All parts but the first by name, from the sides of all rows in order; on the CPU."""

    def step(self, values: Tensor, encoded: Encoded, start: int) -> Tensor:
        """The distance between neighbouring codes at these values, for encoders that round by chance."""
        raise NotImplementedError

    def slack(self, code: Code) -> float:
        """How far a value may be off because scales are quantized too; `code` is what was written."""
        return 0.0


def whole_rows(columns: int, block: int) -> int:
    """The fewest rows that are whole blocks, of a weight cut into blocks row-major."""
    from math import gcd

    return block // gcd(columns, block)
