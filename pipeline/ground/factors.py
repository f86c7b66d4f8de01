"""How many times its delta a weight may hold, and what went wrong then."""

from __future__ import annotations

from math import isfinite, sqrt
from typing import NamedTuple

SAME_FACTOR = 0.02  # relative: two scales that are told to be the same
TWICE = 2.0


class Scaling(NamedTuple):
    """What a LoRA's scale is made of: alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""

    alpha: float
    rank: int
    stabilised: bool
    default_alpha: float
    default_rank: int

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.stabilised else self.rank)


def known(scaling: Scaling | None) -> list[tuple[float, str]]:
    """(factor, what went wrong) of all mistakes with a scale that have a name."""
    found: list[tuple[float, str]] = [(n, f"merged {w}") for n, w in ((TWICE, "twice"), (3.0, "three times"))]
    found.append((-1.0, "subtracted instead of added"))
    if scaling:
        right, root = scaling.scale, sqrt(scaling.rank)
        plain_alpha, plain_rank = scaling.default_alpha, scaling.default_rank
        found += [
            (1 / right, "the scale was left out (alpha forgotten): B @ A was added as it is"),
            (1 / scaling.alpha, "alpha was taken for 1"),
            (root if scaling.stabilised else scaling.rank, "alpha was not divided by the rank"),
            (1 / root, "scaled by alpha / rank, but the adapter says rslora, alpha / sqrt(rank)")
            if scaling.stabilised
            else (
                root,
                "scaled by alpha / sqrt(rank), as for rslora, but the adapter is plain, alpha / rank",
            ),
            (plain_alpha / scaling.alpha, "alpha_pattern was left out"),
            (scaling.rank / plain_rank, "rank_pattern was left out of the scale"),
        ]
        if not scaling.stabilised:
            found.append((1 / root, "its scale is too small by sqrt(rank)"))
    return [(f, words) for f, words in found if isfinite(f) and abs(f - 1) > SAME_FACTOR]


def reasons(factor: float, scaling: Scaling | None) -> list[str]:
    """What makes a delta this many times what it should be; several things where they come to the same."""
    matching = [words for value, words in known(scaling) if abs(factor / value - 1) <= SAME_FACTOR]
    return list(dict.fromkeys(matching)) or ["a scale or weight that the recipe does not name"]
