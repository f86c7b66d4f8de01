"""Differences weighed by what is put in: D L, whose squares are those of the outputs of D.

C = L L.T are the second moments of a module's inputs, scaled to a mean of 1 on the diagonal, with a share of
the identity added (shrinkage), so that ||D L||^2 is ||D||^2 where inputs have no direction. The best low
rank in the outputs, SVD_r(D L) L^-1 (cf. SVD-LLM, CorDA, EoRA arXiv:2410.21271), is U U.T D with the left
vectors U of D L: nothing is inverted, and what it captures of D, or of D X.T for any inputs X, are the
squares of U.T D or U.T D X.T, row by row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.calibration import Moments
from pipeline.ground.errors import PipelineError
from pipeline.ground.files import read_tensor, write_all
from pipeline.ground.lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 23  # elements of L in memory at a time


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one or more modules see, put aside in a file: L (n, n), then inputs held out (k, n), float32."""

    path: Path
    width: int  # n
    rows: int  # that C is the mean of
    held: int  # k

    def whitened(self, D: Tensor) -> Tensor:
        """D L, (m, n), with a block of L in memory at a time."""
        import torch

        made = torch.zeros_like(D)
        step = max(_BLOCK // self.width, 1)
        for start in range(0, self.width, step):
            stop = min(start + step, self.width)
            L = self._read(start, stop).to(D.device)
            made[:, :stop] += D[:, start:stop] @ L[:, :stop]  # L is zero above its diagonal
        return made

    def held_out(self) -> Tensor:
        """X (k, n): inputs that L was not made of."""
        return self._read(self.width, self.width + self.held)

    def _read(self, start: int, stop: int) -> Tensor:
        import torch

        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            raw = read_tensor(descriptor, start * self.width * 4, (stop - start) * self.width * 4)
        finally:
            os.close(descriptor)
        return raw.view(torch.float32).view(stop - start, self.width)


def put_aside(path: Path, moments: Moments, shrinkage: float) -> Inputs | None:
    """The factor of the moments, which are used up, and the inputs held out; None where all inputs are zero.

    In float64: with inputs whose size lies in a few directions C / mean spans more than float32 has digits.
    """
    import torch

    C, held = moments.C, torch.cat(moments.held)
    C = C.cpu().double() if str(C.device).startswith("mps") else C
    mean = float(C.diagonal().mean())
    if mean == 0:
        return None
    C /= mean
    C.diagonal().add_(shrinkage)
    L, failed = torch.linalg.cholesky_ex(C)
    if int(failed) or not bool(L.diagonal().isfinite().all()):
        raise PipelineError(
            f"extract.shrinkage: {shrinkage:g} leaves the moments of an input of width {len(C)} without a "
            "factor, or they are not finite; give a larger share, or other text"
        )
    with path.open("wb") as file:
        for at, part in ((0, L.float()), (L.numel() * 4, held)):
            write_all(file.fileno(), at, memoryview(part.contiguous().cpu().view(-1).numpy()).cast("B"))
    return Inputs(path, len(C), moments.rows, len(held))


class Seen(NamedTuple):
    """What triples are worth in outputs, energies triple by triple, of two ways to choose them."""

    S: tuple[float, ...]  # of D L, the singular values of the best
    energy: float  # ||D L||^2
    held: tuple[float, ...]  # of ||D X.T||^2 on inputs held out
    held_plain: tuple[float, ...]  # the same where singular vectors of D are kept instead
    held_energy: float  # ||D X.T||^2

    def captured(self, rank: int) -> float:
        """The share of ||D L||^2 that the first `rank` triples hold."""
        return sum(s * s for s in self.S[:rank]) / self.energy if self.energy else 1.0


def projected(D: Tensor, low: LowRank, energy: float, plain: LowRank, X: Tensor) -> tuple[LowRank, Seen]:
    """U U.T D with the left vectors of `low`, the best of D L, whose ||D L||^2 is `energy`; and its worth.

    In place of singular values it has the lengths of the rows of U.T D, in the order of those of D L.
    """
    P = low.U.T @ D
    total = float((D @ X.T).double().square().sum())
    seen = Seen(
        tuple(low.S.double().tolist()),
        energy,
        _row_energies(P @ X.T),
        _row_energies(plain.SVt @ X.T),
        total,
    )
    return LowRank(low.U, P.norm(dim=1), P), seen


def turned(low: LowRank) -> LowRank:
    """Of D.T, the same of D; the left vectors have the length one and need not be orthogonal."""
    safe = low.S.masked_fill(low.S == 0, 1)
    return LowRank((low.SVt / safe[:, None]).T, low.S, low.S[:, None] * low.U.T)


def _row_energies(rows: Tensor) -> tuple[float, ...]:
    return tuple(rows.double().square().sum(1).tolist())
