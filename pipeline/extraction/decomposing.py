"""Differences turned into factors, one matrix after the other, and put on disk as they come.

As many matrices as there are workers are in memory, each computed on one thread, so that no bit depends
on how many there are; while one is decomposed another is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.extraction.parameters import Parameter, Slice
from pipeline.extraction.rule import Rule, rounding_of
from pipeline.ground.lowrank import LowRank, low_rank
from pipeline.ground.model_modules import Kind
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress, say
from pipeline.ground.ranks import (
    Budget,
    Energy,
    NoiseEdge,
    above,
    fitted,
    for_energy,
    noise_edge,
)
from pipeline.ground.rounding import ulp
from pipeline.ground.scratch import Scratch
from pipeline.ground.spool import Kept, Spool
from pipeline.ground.whitening import Inputs, Seen, projected, turned
from pipeline.merging.pieces import Merged

if TYPE_CHECKING:
    from torch import Tensor

_NOISE_TILES = 8  # of each matrix, from which its rounding noise is taken
_FIRST_RANK = 32  # that is tried where the noise decides
_WAITING = 8  # small matrices that may be done before a large one which comes first: their factors are small


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


def decompose(
    parameters: Sequence[Parameter],
    rule: Rule,
    device: str,
    workers: int,
    spool: Spool,
    keys: Sequence[str],
    inputs: Mapping[str, Inputs],
) -> list[list[Decomposed]]:
    """For each parameter its matrices decomposed, to as many triples as the rule may keep.

    By their worth in outputs where its inputs are known, by name. Each is finished in the spool under its
    key, and what stands there already is taken as it is.
    """
    keep_freed_memory()
    found = [[_decomposed(one) for one in spool.told(key) or ()] for key in keys]
    if standing := sum(map(bool, found)):
        say(f"resuming: {standing} of {len(parameters)} modules stand already")
    jobs = [(n, slices) for n, p in enumerate(parameters) if not found[n] for slices in p.matrices]
    total = sum(s.pair.tuned.num_columns * (s.stop - s.start) * 4 for _, slices in jobs for s in slices)
    work = partial(_decompose, rule, device, Scratch())
    tasks = (partial(work, n, parameters[n], slices, inputs.get(parameters[n].name)) for n, slices in jobs)
    with (
        plain_arithmetic(),
        Progress("extracting", total) as bar,
        in_order(tasks, workers, workers + _WAITING) as done,
    ):
        for result in done:
            S, key = tuple(result.S.double().tolist()), keys[result.number]
            left, right = spool.keep(key, result.left), spool.keep(key, result.right)
            own = found[result.number]
            own.append(Decomposed(left, right, S, result.energy, result.edge, result.noise, result.seen))
            if len(own) == len(parameters[result.number].matrices):
                spool.finish(key, [asdict(one) for one in own])
            bar.advance(result.num_bytes)
    return found


def _decomposed(told: Mapping[str, Any]) -> Decomposed:
    left, right = Kept(**told["left"]), Kept(**told["right"])
    weighed: list[Any] = [tuple(v) if isinstance(v, list) else v for v in told["seen"] or ()]
    seen = Seen(*weighed) if weighed else None
    return Decomposed(**{**told, "left": left, "right": right, "S": tuple(told["S"]), "seen": seen})


def _decompose(
    rule: Rule,
    device: str,
    scratch: Scratch,
    number: int,
    parameter: Parameter,
    slices: Sequence[Slice],
    inputs: Inputs | None,
) -> _Result:
    D, noise = difference(slices, device, scratch)
    num_bytes = D.numel() * 4
    D = D.view(parameter.matrix)
    energy = float(D.double().square().sum()) if D.numel() < 1 << 22 else float(_energy(D))
    edge = noise_edge(noise.of_row, noise.of_column, *D.shape)
    if inputs is None:
        low, seen = _leading(D, parameter, rule, energy, edge, scratch), None
    else:
        low, seen = _weighed(D, parameter, rule, energy, edge, inputs, scratch)
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
    D: Tensor,
    parameter: Parameter,
    rule: Rule,
    energy: float,
    edge: float,
    inputs: Inputs,
    scratch: Scratch,
) -> tuple[LowRank, Seen]:
    """The triples worth most in outputs; a rank that the noise decides is that of D, whose edge is known."""
    is_turned = parameter.place.kind is Kind.conv1d  # (in, out)
    D = D.T.contiguous() if is_turned else D
    whitened = inputs.whitened(D)
    of_outputs = float(_energy(whitened))
    if isinstance(rule.rank, NoiseEdge) and rule.fixed(parameter) is None:
        plain = _leading(D, parameter, rule, energy, edge, scratch)
        most = max(len(plain.S), 1)
        low = low_rank(whitened, most, rule.seed, rule.method, scratch).first(len(plain.S))
    else:
        low = _leading(whitened, parameter, rule, of_outputs, 0.0, scratch)
        del whitened
        plain = low_rank(D, len(low.S), rule.seed, rule.method, scratch)
    low, seen = projected(D, low, of_outputs, plain, inputs.held_out().to(D.device))
    return (turned(low) if is_turned else low), seen


def _energy(D: Tensor) -> float:
    return sum(float(part.flatten().dot(part.flatten())) for part in D.split(max((1 << 20) // D.shape[1], 1)))


def _leading(
    D: Tensor, parameter: Parameter, rule: Rule, energy: float, edge: float, scratch: Scratch
) -> LowRank:
    """The triples that the rule keeps, or may keep where a budget decides later."""
    most, kept = rule.most(parameter), rule.multiple_of
    if rule.fixed(parameter) is not None or isinstance(rule.rank, Budget):
        return low_rank(D, most, rule.seed, rule.method, scratch)
    if isinstance(rule.rank, Energy):
        low = low_rank(D, most, rule.seed, rule.method, scratch)
        return low.first(fitted(for_energy(low.S, energy, rule.rank.share) or most, most, kept))
    tried = min(_FIRST_RANK, most)
    while True:
        low = low_rank(D, tried, rule.seed, rule.method, scratch)
        count = above(low.S, edge)
        if count < tried or tried == most:
            return low.first(fitted(count, most, kept) if count else 0)
        tried = min(4 * tried, most)


class Noise(NamedTuple):
    """Sums of the variances of rounding errors: the largest of a row and of a column, and all."""

    of_row: float
    of_column: float
    energy: float


def difference(slices: Sequence[Slice], device: str, scratch: Scratch) -> tuple[Tensor, Noise]:
    """(rows, columns) tuned - base in float32, and the noise of the tuned values' rounding; 0 if unknown."""
    import torch

    rows, columns = sum(s.stop - s.start for s in slices), slices[0].pair.tuned.num_columns
    D = scratch.empty("difference", (rows, columns), torch.float32, torch.device(device))
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
