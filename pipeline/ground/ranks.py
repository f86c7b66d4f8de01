"""How many singular triples of each difference are kept: a number, the noise's edge, energy, or a budget."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any

from pipeline.ground.errors import Refused
from pipeline.ground.names import matches, unreadable
from pipeline.ground.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_TRACY_WIDOM = (
    2.0  # how far above the edge the largest of many noise values still comes, one time in a hundred
)


@dataclass(frozen=True, slots=True)
class NoiseEdge:
    """`auto`: every singular value above the Marchenko-Pastur edge of the known rounding noise."""


@dataclass(frozen=True, slots=True)
class Energy:
    """`{energy: 0.95}`: the fewest that hold this share of ||D||^2."""

    share: float


@dataclass(frozen=True, slots=True)
class Budget:
    """`{parameters: 40M}` or `{size: 80MB}`: those that pay most per parameter, over all modules."""

    amount: int
    in_bytes: bool


Rank = int | NoiseEdge | Energy | Budget


def parse_rank(value: Any) -> Rank | None:
    """The rule that a recipe writes; Refused for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    if value == "auto":
        return NoiseEdge()
    if isinstance(value, Mapping) and len(value) == 1:
        [(form, amount)] = value.items()
        if form == "energy" and isinstance(amount, int | float) and 0 < amount < 1:
            return Energy(float(amount))
        if form == "parameters":
            return Budget(_count(amount), in_bytes=False)
        if form == "size":
            return Budget(parse_bytes("rank.size", amount), in_bytes=True)
    raise Refused(
        f"rank: {value!r} is no rank; write a number, auto, {{energy: 0.95}}, {{parameters: 40M}} or "
        "{size: 80MB}"
    )


def _count(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBG]?)", str(value).strip().upper())
    number = int(float(match[1]) * _COUNTS[match[2]]) if match else 0
    if number < 1:
        raise Refused(f"rank.parameters: {value!r} is not a number of parameters; write it as 40M or 1.5B")
    return number


def parse_pattern(key: str, value: Any, whole: bool) -> dict[str, float]:
    """{module pattern: number} of rank_pattern and alpha_pattern; Refused for anything else."""
    if not isinstance(value or {}, Mapping):
        raise Refused(f"{key}: {value!r} is not a table; write {{q_proj: 8}}")
    table = dict(value or {})
    if reasons := [reason for pattern in table if (reason := unreadable(str(pattern)))]:
        raise Refused(f"{key}: {reasons[0]}")
    kinds = int if whole else int | float
    for pattern, number in table.items():
        fits = isinstance(pattern, str) and isinstance(number, kinds) and not isinstance(number, bool)
        if not fits or not isfinite(number) or number <= 0:
            raise Refused(
                f"{key}: {pattern!r}: {number!r} is not a module and a {'rank' if whole else 'number'}"
            )
    return table


def by_pattern(module: str, table: Mapping[str, float]) -> float | None:
    """What the first pattern that means this module gives it."""
    return next((number for pattern, number in table.items() if matches(module, pattern)), None)


def noise_edge(of_row: float, of_column: float, m: int, n: int) -> float:
    """The largest singular value that (m, n) independent errors have, but for bad luck.

    `of_row` and `of_column` are the largest sums of their variances along a row and a column. The sum of
    the roots bounds errors of uneven sizes (Bandeira and van Handel 2016, arXiv:1408.6185); of even ones
    it is the Marchenko-Pastur edge, s (sqrt m + sqrt n). Some of the Tracy-Widom spread around the edge is
    added (Johnstone 2001).
    """
    around = sqrt(m) + sqrt(n)
    spread = (1 / sqrt(m) + 1 / sqrt(n)) ** (1 / 3) / around
    return (sqrt(of_row) + sqrt(of_column)) * sqrt(1 + _TRACY_WIDOM * spread)


def above(S: Tensor, edge: float) -> int:
    """How many of the falling singular values lie above the edge."""
    return int((edge < S).sum())


def for_energy(S: Tensor, total: float, share: float) -> int | None:
    """The fewest of them with this share of the total ||D||^2; None where all of them have less."""
    held = S.double().square().cumsum(0)
    enough = int((held < share * total).sum()) + 1
    return enough if enough <= len(S) else None


def fitted(rank: int, most: int, multiple_of: int = 1) -> int:
    """The rank as a multiple, upwards, and no more than the matrix or `max_rank` allows."""
    return min(-(-rank // multiple_of) * multiple_of, most)


def water_filled(
    spectra: Sequence[Sequence[float]], costs: Sequence[int], budget: int, multiple_of: int = 1
) -> list[int]:
    """Ranks whose parameters, `costs` for each triple, fit the budget: most energy per parameter first.

    `spectra` are falling singular values. Triples go in groups of `multiple_of`; a group that no longer
    fits does not keep a cheaper one of another matrix out.
    """
    ranks, left = [0] * len(spectra), budget
    waiting = [_gain(spectra[i], 0, multiple_of, costs[i], i) for i in range(len(spectra)) if len(spectra[i])]
    heapq.heapify(waiting)
    while waiting:
        worth, i = heapq.heappop(waiting)
        group = min(multiple_of, len(spectra[i]) - ranks[i])
        if worth == 0 or group * costs[i] > left:
            continue
        ranks[i] += group
        left -= group * costs[i]
        if ranks[i] < len(spectra[i]):
            heapq.heappush(waiting, _gain(spectra[i], ranks[i], multiple_of, costs[i], i))
    return ranks


def _gain(S: Sequence[float], start: int, group: int, cost: int, i: int) -> tuple[float, int]:
    taken = S[start : start + group]
    return (-sum(float(s) ** 2 for s in taken) / (len(taken) * cost), i)
