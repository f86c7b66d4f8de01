"""merge=magnitude_prune: of each adapter's delta on a weight the largest elements, summed with their weights.

int(density * elements) of them stay, and all whose magnitude equals that of the least of these. One adapter
is pruned likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.combining import Combination
from pipeline.ground.selecting import Largest
from pipeline.stage import stage
from pipeline.stages.merge.exact import Exact


@stage("magnitude_prune")
@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(Exact):
    """Base plus the largest changes of each adapter."""

    density: float = 0.5
    """share of each delta that is kept, the largest magnitudes; above 0, at most 1"""

    def check(self) -> None:
        super().check()
        Largest(self.density)

    @property
    def combination(self) -> Combination | None:
        return Combination("magnitude_prune", Largest(self.density)) if self.density < 1 else None
