"""merge=ties: each delta pruned to its largest elements, a sign elected for each element, and the mean of
those deltas that have it (Yadav et al. 2023, arXiv:2306.01708; PEFT's formulas, on full deltas).

Adapters vote with their deltas before their weights, and the mean divides by how many agree, as in PEFT. Of
one adapter, or where one alone reaches a weight, what pruning leaves is its own majority.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.combining import Combination, MajoritySign
from pipeline.ground.selecting import Largest
from pipeline.stage import stage
from pipeline.stages.merge.magnitude_prune import MagnitudePrune


@stage("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(MagnitudePrune):
    """Base plus the mean of the largest changes that agree in sign."""

    majority_sign: MajoritySign = MajoritySign.total
    """what elects a sign: total, the sum of the deltas; frequency, how many have it"""

    @property
    def combination(self) -> Combination:
        return Combination("ties", Largest(self.density), self.majority_sign)
