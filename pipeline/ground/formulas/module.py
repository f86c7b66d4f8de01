"""What a formula is given and gives: a module's tensors, the base's parameter, rows of change."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rows = Callable[[int, int], "Tensor"]  # rows(start, stop) of a matrix, float64


class Change(NamedTuple):
    """What is added to a parameter, by rows of its matrix, and what the slack of their sums is taken of.

    `size` is |scale| |B| |A| where the change is such a product; None leaves it to the norms of the rows.
    """

    rows: Rows
    size: Rows | None = None


@dataclass(frozen=True)
class Module:
    """The tensors of one module by their names in its key: lora_A, lora_B.bias, hada_w1_a; no `.weight`.

    `file` is what safetensors opened; `name` is the module's as the config's patterns mean it. `largest`
    (out, in) is that of all modules of the adapter, which matrices drawn for all of them depend on.
    """

    name: str
    config: Mapping[str, Any]
    file: Any
    keys: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    largest: tuple[int, int] = (0, 0)
    expert_major: bool = False  # lora_B of experts is (out, experts * rank)
    model_type: str | None = None  # of the base

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.keys

    def __getitem__(self, tensor: str) -> Tensor:
        """The tensor in float64."""
        return self.raw(tensor).double()

    def raw(self, tensor: str) -> Tensor:
        """The tensor, its own or one that all modules share, as the file has it."""
        found: Tensor = self.file.get_tensor(self.keys.get(tensor) or self.shared[tensor])
        return found

    def rows(self, tensor: str) -> Rows:
        """Rows of it in float64, read when they are asked for."""
        part = self.file.get_slice(self.keys[tensor])
        return lambda start, stop: part[start:stop].double()

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.keys[tensor]).get_shape())

    def by_pattern(self, field: str, otherwise: str) -> float:
        """The config's value of the first pattern that ends the module's name, else that of `otherwise`."""
        for pattern, value in (self.config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.name):
                return float(value)
        return float(self.config[otherwise])


@dataclass(frozen=True)
class Parameter:
    """The base's, as the module means it: `dims`, and the matrix that it is of rows `(out, everything else)`.

    Stacked experts `(experts, d1, d2)` are a matrix of experts * d1 rows. `dtype` is the base's values' own.
    """

    dims: tuple[int, ...]
    shape: tuple[int, int]
    rows: Rows
    dtype: Callable[[], torch.dtype]


Formula = Callable[[Module, Parameter], Change]


def rows_of(matrix: Tensor) -> Rows:
    """Rows of a matrix that is there as a whole."""
    return lambda start, stop: matrix[start:stop]


def dense(change: Tensor) -> Change:
    """A change that is there as a whole matrix."""
    return Change(rows_of(change))


def product(left: Rows, right: Tensor, scale: float) -> Change:
    """scale * left @ right, `left` (out, r) by rows, `right` (r, in)."""
    size = right.abs()
    return Change(
        lambda start, stop: scale * (left(start, stop) @ right),
        lambda start, stop: abs(scale) * (left(start, stop).abs() @ size),
    )


def instead(value: Rows, W: Rows) -> Change:
    """A new value as the change that leads to it."""
    return Change(lambda start, stop: value(start, stop) - W(start, stop))
