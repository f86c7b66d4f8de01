"""merge=dare_linear: random elements of each delta, divided by their share, summed with their weights
(Yu et al. 2024, arXiv:2311.03099).

What is kept depends on seed, adapter (its number in the list), weight name and element alone. One adapter is
thinned likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.combining import Combination
from pipeline.ground.selecting import AtRandom
from pipeline.stage import stage
from pipeline.stages.merge.exact import Exact


@stage("dare_linear")
@dataclass(frozen=True, kw_only=True)
class DareLinear(Exact):
    """Base plus random elements of each adapter's changes, scaled up."""

    density: float = 0.5
    """probability with which an element of a delta is kept, then divided by it; above 0, at most 1"""

    def check(self) -> None:
        super().check()
        AtRandom(self.density, self.seed)

    @property
    def combination(self) -> Combination | None:
        return Combination("dare_linear", AtRandom(self.density, self.seed)) if self.density < 1 else None
