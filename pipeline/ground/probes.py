"""What a layer makes of probes: ||E x|| / ||D x||, E = O - (W + D) what the stored weight is off by.

Probes are random, or combinations of the rows of A, for which alone a LoRA does anything at all: there a
delta that has shrunk shows, while the noise of rounding averages out over the inputs (spec, fidelity 2).
A matrix that lies turned, `(in, out)`, takes its inputs along its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.ground.divergence import interval_of, resampled
from pipeline.ground.selecting import key

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("random", "aligned")


def random_probes(name: str, size: int, count: int) -> Tensor:
    """`(size, count)` float64 inputs of about unit length, the same for the same name."""
    import torch

    generator = torch.Generator().manual_seed(key(0, 0, name) >> 1)
    return torch.randn(size, count, generator=generator, dtype=torch.float64) / max(size, 1) ** 0.5


def aligned_probes(name: str, A: Tensor, count: int) -> Tensor:
    """`(size, count)` combinations of the rows of A `(rank, size)`, each row taken at unit length."""
    rows = A / A.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return rows.T @ random_probes(f"{name} along A", len(rows), count)


@dataclass
class Outputs:
    """Squared norms of what one matrix made of each probe."""

    off: Tensor  # ||E x||^2
    made: Tensor  # ||D x||^2
    best: Tensor | None = None  # what one rounding to nearest is off by; None for codes

    @property
    def outerr(self) -> float:
        """||E x|| / ||D x|| over all probes."""
        return _share(self.off, self.made)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval, by probes drawn with replacement."""
        return _interval(self.off, self.made)

    @property
    def beyond_best(self) -> float:
        """How many times as far off as one rounding to nearest: the lower end of the 95 % interval."""
        if self.best is None:
            return 1.0
        return _interval(self.off, self.best)[0] if float(self.best.sum()) else float("inf")

    def as_dict(self, kind: str) -> dict[str, Any]:
        """For report.json."""
        told = {"outerr": self.outerr, "outerr_interval": list(self.interval)}
        if self.best is not None:
            told["outerr_of_rounding"] = _share(self.best, self.made)
        return {f"{kind}_{key}": value for key, value in told.items()}


def _share(one: Tensor, other: Tensor) -> float:
    below = float(other.sum())
    return (float(one.sum()) / below) ** 0.5 if below else 0.0


def _interval(one: Tensor, other: Tensor) -> tuple[float, float]:
    import torch

    sums = resampled(torch.stack([one, other]))
    low, high = interval_of(sums[0] / sums[1].clamp_min(1e-300))
    return low**0.5, high**0.5


@dataclass
class Matrix:
    """One matrix of a weight, its probes, and their outputs as its rows stream past."""

    X: Tensor  # (inputs, probes), kind after kind
    kinds: tuple[str, ...]
    turned: bool
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, start: int, parts: dict[str, Tensor]) -> None:
        """Rows start: of the matrix, float64: E as `off`, D as `made`, R as `best`."""
        for part, rows in parts.items():
            if self.turned:
                found = self.X[start : start + len(rows)].T @ rows
            else:
                found = (rows @ self.X).square_().sum(0)
            self.sums[part] = self.sums[part] + found if part in self.sums else found

    def outputs(self, kind: str) -> Outputs | None:
        """None where there are no probes of this kind."""
        if kind not in self.kinds or not self.sums:
            return None
        parts = {name: p.square().sum(1) if self.turned else p for name, p in self.sums.items()}
        own = {name: p.chunk(len(self.kinds))[self.kinds.index(kind)] for name, p in parts.items()}
        return Outputs(own["off"], own["made"], own.get("best"))
