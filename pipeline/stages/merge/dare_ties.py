"""merge=dare_ties: random elements of each delta, divided by their share, then signs elected as in merge=ties
(Yu et al. 2024, arXiv:2311.03099).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.combining import Combination, MajoritySign
from pipeline.ground.selecting import AtRandom
from pipeline.stage import stage
from pipeline.stages.merge.dare_linear import DareLinear


@stage("dare_ties")
@dataclass(frozen=True, kw_only=True)
class DareTies(DareLinear):
    """Base plus the mean of random elements, scaled up, that agree in sign."""

    majority_sign: MajoritySign = MajoritySign.total
    """what elects a sign: total, the sum of the deltas; frequency, how many have it"""

    @property
    def combination(self) -> Combination:
        return Combination("dare_ties", AtRandom(self.density, self.seed), self.majority_sign)
