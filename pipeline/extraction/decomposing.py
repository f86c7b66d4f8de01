"""Differences turned into factors, one matrix after the other, and put on disk as they come.

As many matrices as there are workers are in memory, each computed on one thread, so that no bit depends
on how many there are; while one is decomposed another is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pipeline.extraction.parameters import Parameter, Slice
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.lowrank import LowRank, Method, low_rank
from pipeline.ground.model_modules import Kind
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.ranks import (
    Budget,
    Energy,
    NoiseEdge,
    Rank,
    above,
    by_pattern,
    fitted,
    for_energy,
    noise_edge,
)
from pipeline.ground.rounding import ulp
from pipeline.ground.spool import Kept, Spool
from pipeline.ground.whitening import Inputs, Seen, projected, turned
from pipeline.pieces import Merged
from pipeline.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

_NOISE_TILES = 8  # of each matrix, from which its rounding noise is taken
_FIRST_RANK = 32  # that is tried where the noise decides
BUDGET_MOST = 256  # rank of a module under a budget, where max_rank does not say


@dataclass(frozen=True)
class Rule:
    """How many triples are kept."""

    rank: Rank
    pattern: Mapping[str, int]
    max_rank: int | None = None
    multiple_of: int = 1
    method: Method = Method.auto
    seed: int = 0

    def most(self, parameter: Parameter) -> int:
        """The largest rank that this parameter may get."""
        smaller = min(parameter.matrix)
        most = min(smaller, self.max_rank) if self.max_rank else smaller
        fixed = self.fixed(parameter)
        if fixed is not None:
            return fitted(fixed, most, self.multiple_of)
        if isinstance(self.rank, Budget) and self.max_rank is None:
            return min(most, BUDGET_MOST)
        return most

    def fixed(self, parameter: Parameter) -> int | None:
        """The rank that the recipe gives it as a number."""
        own = by_pattern(parameter.rank_name, self.pattern) or by_pattern(parameter.module, self.pattern)
        if own is not None:
            return int(own)
        return self.rank if isinstance(self.rank, int) else None

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Refused for a rank that a matrix does not have, and for noise that is not known."""
        for parameter in parameters:
            fixed, smaller = self.fixed(parameter), min(parameter.matrix)
            if fixed is not None and min(fixed, self.max_rank or fixed) > smaller:
                rows, columns = parameter.matrix
                raise Refused(
                    f"rank: {fixed} is more than {parameter.name} ({rows} x {columns}) has; give at most "
                    f"{smaller}, or rank_pattern with a smaller one for it"
                )
            if fixed is None and isinstance(self.rank, NoiseEdge):
                for pair in parameter.pairs:
                    if rounding_of(pair.tuned) is None:
                        raise Refused(
                            f"rank: auto needs the rounding noise of the fine-tune, but {pair.name} is "
                            f"stored as {pair.tuned.stored_as}; give a number or {{energy: 0.95}}"
                        )


@dataclass(frozen=True)
class Decomposed:
    """One matrix: its factors on disk, and what they are worth."""

    left: Kept  # (rank, rows): (U sqrt S).T
    right: Kept  # (rank, columns): SVt / sqrt S
    S: tuple[float, ...]  # whose squares are what triples hold of ||D||^2
    energy: float  # ||D||^2
    edge: float  # largest singular value of rounding noise; 0 where that is not known
    noise: float  # ||D||^2 that rounding alone gives
    seen: Seen | None = None  # what they are worth in outputs, where those decided

    @property
    def worth(self) -> tuple[float, ...]:
        """What the triples were chosen by, falling."""
        return self.seen.S if self.seen else self.S

    def captured(self, rank: int) -> float:
        """The share of ||D||^2 that the first `rank` triples hold."""
        return sum(s * s for s in self.S[:rank]) / self.energy if self.energy else 1.0


class _Result(NamedTuple):
    number: int
    left: Tensor
    right: Tensor
    S: Tensor
    energy: float
    edge: float
    noise: float
    seen: Seen | None
    num_bytes: int


def rounding_of(weight: Weight) -> str | None:
    """The dtype to which a fine-tune's weight was rounded; None where that is not known."""
    if isinstance(weight, Merged):
        return "F64"  # not rounded yet
    return weight.stored_as if weight.stored_as in DENSE_FLOATS else None


def decompose(
    parameters: Sequence[Parameter],
    rule: Rule,
    device: str,
    workers: int,
    spool: Spool,
    inputs: Mapping[str, Inputs],
) -> list[list[Decomposed]]:
    """For each parameter its matrices decomposed, to as many triples as the rule may keep.

    By their worth in outputs where its inputs are known, by name.
    """
    keep_freed_memory()
    jobs = [(n, slices) for n, p in enumerate(parameters) for slices in p.matrices]
    found: list[list[Decomposed]] = [[] for _ in parameters]
    total = sum(s.pair.tuned.num_columns * (s.stop - s.start) * 4 for _, slices in jobs for s in slices)
    tasks = (
        partial(_decompose, n, parameters[n], slices, rule, device, inputs.get(parameters[n].name))
        for n, slices in jobs
    )
    with (
        plain_arithmetic(),
        Progress("extracting", total) as bar,
        in_order(tasks, workers, workers) as done,
    ):
        for result in done:
            S = tuple(result.S.double().tolist())
            left, right = spool.keep(result.left), spool.keep(result.right)
            found[result.number].append(
                Decomposed(left, right, S, result.energy, result.edge, result.noise, result.seen)
            )
            bar.advance(result.num_bytes)
    return found


def _decompose(
    number: int,
    parameter: Parameter,
    slices: Sequence[Slice],
    rule: Rule,
    device: str,
    inputs: Inputs | None,
) -> _Result:
    D, noise = difference(slices, device)
    num_bytes = D.numel() * 4
    D = D.view(parameter.matrix)
    energy = float(D.double().square().sum()) if D.numel() < 1 << 22 else float(_energy(D))
    edge = noise_edge(noise.of_row, noise.of_column, *D.shape)
    if inputs is None:
        low, seen = _leading(D, parameter, rule, energy, edge), None
    else:
        low, seen = _weighed(D, parameter, rule, energy, edge, inputs)
    root = low.S.clamp_min(0).sqrt()[:, None]
    safe = root.masked_fill(root == 0, 1)
    return _Result(
        number,
        (low.U.T * root).float().cpu().contiguous(),
        (low.SVt / safe).float().cpu().contiguous(),
        low.S.float().cpu(),
        energy,
        edge,
        noise.energy,
        seen,
        num_bytes,
    )


def _weighed(
    D: Tensor, parameter: Parameter, rule: Rule, energy: float, edge: float, inputs: Inputs
) -> tuple[LowRank, Seen]:
    """The triples worth most in outputs; a rank that the noise decides is that of D, whose edge is known."""
    is_turned = parameter.place.kind is Kind.conv1d  # (in, out)
    D = D.T.contiguous() if is_turned else D
    whitened = inputs.whitened(D)
    of_outputs = float(_energy(whitened))
    if isinstance(rule.rank, NoiseEdge) and rule.fixed(parameter) is None:
        plain = _leading(D, parameter, rule, energy, edge)
        low = low_rank(whitened, max(len(plain.S), 1), rule.seed, rule.method).first(len(plain.S))
    else:
        low = _leading(whitened, parameter, rule, of_outputs, 0.0)
        del whitened
        plain = low_rank(D, len(low.S), rule.seed, rule.method)
    low, seen = projected(D, low, of_outputs, plain, inputs.held_out().to(D.device))
    return (turned(low) if is_turned else low), seen


def _energy(D: Tensor) -> float:
    return sum(float(part.flatten().dot(part.flatten())) for part in D.split(max((1 << 20) // D.shape[1], 1)))


def _leading(D: Tensor, parameter: Parameter, rule: Rule, energy: float, edge: float) -> LowRank:
    """The triples that the rule keeps, or may keep where a budget decides later."""
    most, kept = rule.most(parameter), rule.multiple_of
    if rule.fixed(parameter) is not None or isinstance(rule.rank, Budget):
        return low_rank(D, most, rule.seed, rule.method)
    if isinstance(rule.rank, Energy):
        low = low_rank(D, most, rule.seed, rule.method)
        return low.first(fitted(for_energy(low.S, energy, rule.rank.share) or most, most, kept))
    tried = min(_FIRST_RANK, most)
    while True:
        low = low_rank(D, tried, rule.seed, rule.method)
        count = above(low.S, edge)
        if count < tried or tried == most:
            return low.first(fitted(count, most, kept) if count else 0)
        tried = min(4 * tried, most)


class Noise(NamedTuple):
    """Sums of the variances of rounding errors: the largest of a row and of a column, and all."""

    of_row: float
    of_column: float
    energy: float


def difference(slices: Sequence[Slice], device: str) -> tuple[Tensor, Noise]:
    """(rows, columns) tuned - base in float32, and the noise of the tuned values' rounding; 0 if unknown."""
    import torch

    rows, columns = sum(s.stop - s.start for s in slices), slices[0].pair.tuned.num_columns
    D = torch.empty(rows, columns, device=device)
    of_row, of_columns, seen, at = 0.0, torch.zeros(columns, dtype=torch.float64, device=device), 0, 0
    for part in slices:
        dtype = rounding_of(part.pair.tuned)
        grid = list(part.pair.grid(part.start, part.stop))
        with part.pair.open(device) as tiles:
            for number, (start, stop) in enumerate(grid):
                _, tuned, delta = tiles(start, stop)
                low, high = max(start, part.start), min(stop, part.stop)
                D[at : at + high - low] = delta[low - start : high - start]
                at += high - low
                if dtype and dtype != "F64" and number % -(-len(grid) // _NOISE_TILES) == 0:
                    variances = ulp(tuned, dtype).square() / 12
                    of_row = max(of_row, float(variances.sum(1).max()))
                    of_columns += variances.sum(0)
                    seen += len(tuned)
    if any(isinstance(part.pair.tuned, Merged) for part in slices):  # a float32 sum, not rounded yet
        variance = _energy(D) / max(D.numel(), 1) * 2.0**-40
        return D, Noise(variance * columns, variance * rows, variance * D.numel())
    of_columns *= rows / max(seen, 1)
    return D, Noise(of_row, float(of_columns.max()), float(of_columns.sum()))


def workers_for(parameters: Sequence[Parameter], most: int, free: int, whitened: bool = False) -> int:
    """How many matrices may be in memory at once."""
    needed = max((bytes_needed(p, whitened) for p in parameters), default=1)
    return max(1, min(most, free // max(needed, 1)))


def bytes_needed(parameter: Parameter, whitened: bool = False) -> int:
    """Memory for one of its matrices while it is decomposed; beside itself as its inputs weigh it."""
    m, n = sorted(parameter.matrix)
    return 4 * ((4 if whitened else 2) * m * n + 4 * m * m)
