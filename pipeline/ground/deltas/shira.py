"""SHiRA: single entries of the weight are trained, delta[i, j] = value (arXiv:2406.13175).

Bhardwaj et al., "Sparse High Rank Adapters", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shira(Delta):
    """`values` (n,) and `indices` (2, n) of rows and columns, n = r * (in + out)."""

    values: Entry
    indices: Entry
    r: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.values, self.indices)

    @property
    def state_bytes(self) -> int:
        return 3 * super().state_bytes

    def describe(self, factor: float) -> str:
        told = f"SHiRA {self.values.shape[0]} entries"
        return told + (f" scale {factor:g}" if factor != 1 else "")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        told, sides = super().misfit(shape), self.values.shape[0] // self.r
        if told is None and sum(shape) != sides:
            return f"was made for a weight whose sides add up to {sides}"
        return told

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        found = read_entry(self.indices, device)
        where = found.to(torch.int64)
        sides = torch.tensor(self.shape, device=device)[:, None]
        if bool(((where < 0) | (where >= sides) | (where != found)).any()):
            raise Refused(f"'{self.module}' has shira_indices that lie outside of {list(self.shape)}")
        row, order = where[0].sort(stable=True)
        column, values = where[1][order], read_entry(self.values, device, dtype)[order] * factor

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            first, last = torch.searchsorted(row, torch.tensor([start, stop], device=device)).tolist()
            delta = values.new_zeros(stop - start, self.num_columns)
            place = (row[first:last] - start, column[first:last])
            return delta.index_put_(place, values[first:last], accumulate=True)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    values, indices, r = trained["shira_weight"], trained["shira_indices"], trained.config["r"]
    check_floats(trained, values)
    sizes = check_shapes(trained, {"shira_weight": ("n",), "shira_indices": (2, "n")})
    if indices.dtype not in ("I32", "I64", "F32"):  # floats are written on Windows
        raise trained.refuse(f"has shira_indices of {indices.dtype}, which are no indices")
    if sizes["n"] % r:
        raise trained.refuse(f"has {sizes['n']} entries, which is no multiple of the config's r, {r}")
    return [Shira(trained.module, "weight", (UNKNOWN, UNKNOWN), values, indices, r)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    return wrong_values(config, counts=["r"])


KIND = Kind(
    peft_type="SHIRA",
    tensors=("shira_weight", "shira_indices"),
    fields=frozenset({"r", "mask_type", "random_seed", "init_weights"}),
    read=read,
    wrong=wrong,
)
