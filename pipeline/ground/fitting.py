"""How many times its delta a weight of plain numbers holds, though rounding may have swallowed most of it."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import TYPE_CHECKING

from pipeline.ground.factors import TWICE, Scaling, known
from pipeline.ground.rounding import round_to, ulp

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 0.01  # of the values may be others, and a tenth of those that speak against what should stand there
EXACT = 1e-3  # what a factor may be off by that explains the values to the bit
_SIGMAS = 4.0
_DOUBLINGS, _HALVINGS = 12, 16  # of the range in which a factor is looked for


def exact_factor(W: Tensor, D: Tensor, O: Tensor, dtype: str, scaling: Scaling | None) -> float | None:  # noqa: E741
    """The factor of a known mistake that explains all values but a few to the bit; None if none does."""
    enough = _few(W, D, O, dtype)
    tried = [(_misses(values, O), factor) for factor, values in _known(W, D, dtype, scaling)]
    misses, factor = min(tried, key=lambda one: one[0])
    return factor if misses <= enough else None


def _few(W: Tensor, D: Tensor, O: Tensor, dtype: str) -> float:  # noqa: E741
    """The share of the values that an explanation may leave out."""
    return min(_FEW, _misses(round_to(W + D, dtype), O) / 10)


def _known(W: Tensor, D: Tensor, dtype: str, scaling: Scaling | None) -> Iterator[tuple[float, Tensor]]:
    """(factor, stored values) of every known mistake with the scale; twice also as two merges make it."""
    for factor in dict.fromkeys([0.0, *(factor for factor, _ in known(scaling))]):
        yield factor, round_to(W + factor * D, dtype)
    yield TWICE, round_to(round_to(W + D, dtype).double() + D, dtype)


def _misses(values: Tensor, O: Tensor) -> float:  # noqa: E741
    return float((values.double() != O).double().mean())


def fitted_factor(W: Tensor, D: Tensor, O: Tensor, dtype: str, loose: float) -> tuple[float, float]:  # noqa: E741
    """(factor, its uncertainty): round(W + factor D) holds as much of D as O does.

    The slope of O - W over D would be too small where steps of less than half a unit are lost. The
    uncertainty is what independent errors of `loose` times the square of one rounding may do to it.
    """
    unit = ulp((W + D).abs().maximum(O.abs()), dtype)
    spread = _SIGMAS * sqrt(loose * float((unit * D).square().sum()) / 12)
    held = float(((O - W) * D).sum())
    low, middle, high = (_factor_that_holds(held + s, W, D, dtype) for s in (-spread, 0.0, spread))
    if _misses(round_to(W + middle * D, dtype), O) <= _few(W, D, O, dtype):
        return middle, EXACT
    return middle, (high - low) / 2


def _factor_that_holds(wanted: float, W: Tensor, D: Tensor, dtype: str) -> float:
    """Where <round(W + factor D) - W, D>, which grows with the factor, comes to `wanted`."""

    def holds(factor: float) -> bool:
        return float(((round_to(W + factor * D, dtype).double() - W) * D).sum()) >= wanted

    low, high = -1.0, 1.0
    for _ in range(_DOUBLINGS):
        if holds(high):
            break
        low, high = high, 2 * high
    for _ in range(_DOUBLINGS):
        if not holds(low):
            break
        low, high = 2 * low, low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return (low + high) / 2
