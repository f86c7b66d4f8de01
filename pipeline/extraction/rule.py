"""How many triples of a difference are kept: a recipe's rank, patterns and bounds, for one parameter each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.extraction.parameters import Parameter
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.lowrank import Method
from pipeline.ground.ranks import Budget, NoiseEdge, Rank, by_pattern, fitted
from pipeline.merging.pieces import Merged
from pipeline.weight import Weight

_BUDGET_MOST = 256  # rank of a module under a budget, where max_rank does not say


@dataclass(frozen=True)
class Rule:
    """How many triples are kept."""

    rank: Rank
    pattern: Mapping[str, int]
    max_rank: int | None = None
    multiple_of: int = 1
    method: Method = Method.auto
    seed: int = 0
    menu: Sequence[int] = ()  # of ranks; a number that holds for all modules is rounded up to one of them

    def most(self, parameter: Parameter) -> int:
        """The largest rank that this parameter may get."""
        smaller = min(*parameter.matrix, *self.menu[-1:])
        most = min(smaller, self.max_rank) if self.max_rank else smaller
        fixed = self.fixed(parameter)
        if fixed is not None:
            main = self.rounded_up(fixed) if fixed == self.rank else fixed
            return fitted(main, most, self.multiple_of)
        if isinstance(self.rank, Budget) and self.max_rank is None:
            return min(most, _BUDGET_MOST)
        return most

    def rounded_up(self, rank: int) -> int:
        """The rank of the menu that holds it, if max_rank allows that."""
        return next((n for n in self.menu if rank <= n <= (self.max_rank or n)), rank)

    def fixed(self, parameter: Parameter) -> int | None:
        """The rank that the recipe gives it as a number."""
        own = self.own(parameter)
        if own is not None:
            return int(own)
        return self.rank if isinstance(self.rank, int) else None

    def asks(self, parameter: Parameter) -> tuple[object, ...]:
        """All of it that decides which triples of this parameter are found (see `_leading`)."""
        how = (self.most(parameter), self.method, self.seed)
        if self.fixed(parameter) is not None or isinstance(self.rank, Budget):
            return how
        return (*how, self.rank, self.multiple_of)

    def own(self, parameter: Parameter) -> float | None:
        """What rank_pattern says of it."""
        return by_pattern(parameter.rank_name, self.pattern) or by_pattern(parameter.module, self.pattern)

    def exceeds(self, parameter: Parameter) -> bool:
        """Whether the rank for all modules is more than this one's matrix has."""
        fixed = self.fixed(parameter)
        given = fixed is not None and self.own(parameter) is None
        return given and min(fixed or 0, self.max_rank or fixed or 0) > min(parameter.matrix)

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Refused for a rank that a matrix does not have, and for noise that is not known."""
        for parameter in parameters:
            fixed, smaller = self.fixed(parameter), min(parameter.matrix)
            if fixed is not None and min(fixed, self.max_rank or fixed) > smaller:
                rows, columns = parameter.matrix
                key = "rank" if self.own(parameter) is None else "rank_pattern"
                also = ", or rank_pattern with a smaller one for it" if key == "rank" else ""
                raise Refused(
                    f"{key}: {fixed} is more than {parameter.name} ({rows} x {columns}) has; give at most "
                    f"{smaller}{also}"
                )
            if fixed is None and isinstance(self.rank, NoiseEdge):
                for pair in parameter.pairs:
                    if rounding_of(pair.tuned) is None:
                        raise Refused(
                            f"rank: auto needs the rounding noise of the fine-tune, but {pair.name} is "
                            f"stored as {pair.tuned.stored_as}; give a number or {{energy: 0.95}}"
                        )


def rounding_of(weight: Weight) -> str | None:
    """The dtype to which a fine-tune's weight was rounded; None where that is not known."""
    if isinstance(weight, Merged):
        return "F64"  # not rounded yet
    return weight.stored_as if weight.stored_as in DENSE_FLOATS else None
