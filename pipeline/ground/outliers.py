"""What stands out in a merged weight: values that spread further than before, rows and columns that moved.

A row is told where its residual O - (W + D) is, in the root mean square, more than `FAR` times what two
roundings can come to: one of the delta and one of the sum are each off by half a unit in the last place at
most, so that no such merge comes to one. That holds for every arithmetic, also where the distance of single
elements is reported only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from pipeline.ground.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

FAR = 2.0  # times the most that two roundings can come to; products of factors in 16 bits stay below
WIDER = 2.0  # deviations: the delta is then at least sqrt(3) times as large as the weight
LARGER = 4.0  # largest values: a weight that spreads less than WIDER keeps within that, heavy tails too


@dataclass
class Spread:
    """Where values lie; sums in float64."""

    elements: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = inf
    most: float = -inf

    def add(self, values: Tensor) -> None:
        """Counts some more, float64."""
        if not values.numel():
            return
        flat = values.flatten()
        least, most = flat.aminmax()
        self.elements += flat.numel()
        self.total += float(flat.sum())
        self.squares += float(flat.dot(flat))
        self.least, self.most = min(self.least, float(least)), max(self.most, float(most))

    @property
    def std(self) -> float:
        mean = self.total / self.elements if self.elements else 0.0
        return sqrt(max(self.squares / self.elements - mean * mean, 0.0)) if self.elements else 0.0

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(-self.least, self.most) if self.elements else 0.0

    def as_dict(self) -> dict[str, float]:
        """As Statistics has it."""
        n = self.elements
        if not n:
            return {"min": 0.0, "max": 0.0, "mean": 0.0, "std": 0.0}
        return {"min": self.least, "max": self.most, "mean": self.total / n, "std": self.std}


@dataclass
class Lines:
    """The row and the column whose residual is farthest beyond its rounding: (times, number)."""

    worst_row: tuple[float, int] = (0.0, 0)
    off: Tensor | None = None  # squared residuals and allowances by column
    allowed: Tensor | None = None

    def add(self, start: int, residual: Tensor, unit: Tensor, delta: Tensor, dtype: str) -> None:
        """Rows start: of a weight; `residual` is |O - T| less the slack of a float32 sum, all float64."""
        import torch

        eps = torch.finfo(torch_dtype(dtype)).eps
        off = residual.clamp_min(0).square_().nan_to_num_(nan=inf)
        allowed = unit.square().add_((delta * eps).square_())
        times = off.sum(1) / allowed.sum(1)
        row = int(times.argmax())
        self.worst_row = max(self.worst_row, (float(times[row]) ** 0.5, start + row))
        columns, most = off.sum(0), allowed.sum(0)
        self.off = columns if self.off is None else self.off + columns
        self.allowed = most if self.allowed is None else self.allowed + most

    @property
    def worst_column(self) -> tuple[float, int]:
        if self.off is None or self.allowed is None:
            return (0.0, 0)
        times = self.off / self.allowed
        column = int(times.argmax())
        return float(times[column]) ** 0.5, column

    @property
    def row(self) -> list[float]:
        """For report.json: number, and residual in units of what two roundings can come to."""
        return [self.worst_row[1], self.worst_row[0]]

    @property
    def column(self) -> list[float]:
        times, number = self.worst_column
        return [number, times]


def alarms(seen: dict[str, Any]) -> list[str]:
    """Sentences on weights that stand out; `seen` are reference.Facts by name."""
    told = []
    wide = {n: f.after.std / f.before.std for n, f in seen.items() if f.before.std and f.after.elements}
    wide = {n: times for n, times in wide.items() if times > WIDER}
    if wide:
        name = max(wide, key=lambda n: wide[n])
        told.append(
            f"the values of {name} spread {wide[name]:.3g} times as far as before"
            f"{_more(wide)}: the delta is larger than the weight; is its scale right?"
        )
    high = {n: f.after.largest / f.before.largest for n, f in seen.items() if f.before.largest}
    high = {n: times for n, times in high.items() if times > LARGER and n not in wide}
    if high:
        name = max(high, key=lambda n: high[n])
        told.append(
            f"the largest value of {name} is {high[name]:.3g} times what it was "
            f"({seen[name].before.largest:.3g} to {seen[name].after.largest:.3g}){_more(high)}"
        )
    for what in ("row", "column"):
        lines = {n: getattr(f.lines, f"worst_{what}") for n, f in seen.items() if not f.coded}
        if far := {n: line for n, line in lines.items() if line[0] > FAR}:
            name = max(far, key=lambda n: far[n])
            times, number = far[name]
            told.append(
                f"{what} {number} of {name} is {times:.3g} times as far from base + delta as two roundings "
                f"can bring it{_more(far)}"
            )
    return told


def _more(found: dict[str, Any]) -> str:
    return f" ({len(found)} weights do)" if len(found) > 1 else ""
