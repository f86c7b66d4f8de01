"""merge=exact: W + weight * delta in merge_dtype, left to be rounded once by whoever saves it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.combining import Combination
from pipeline.ground.errors import Refused
from pipeline.merging.plan import merged
from pipeline.stage import Merge, stage
from pipeline.weight import Adapter, Checkpoint, Merging, Weight


@stage("exact")
@dataclass(frozen=True, kw_only=True)
class Exact(Merge):
    """Base plus adapter, each weight rounded once."""

    weight: float = 1.0
    """factor on the adapter; negative subtracts it"""

    def check(self) -> None:
        if self.weight == 0 or self.weight != self.weight or abs(self.weight) == float("inf"):
            raise Refused(
                f"merge.weight: {self.weight} would merge nothing; give a finite factor other than 0"
            )

    def __call__(self, base: Checkpoint[Weight], adapter: Adapter) -> Checkpoint[Weight]:
        return merged(base, adapter, self.merging, self.merge_dtype.value)

    @property
    def merging(self) -> Merging:
        """What of the request says what is added to what."""
        return Merging(self.weight, False, self.names, self.tied, self.combination)

    @property
    def combination(self) -> Combination | None:
        """How several deltas on a weight become one, for stages that build on this; None sums them."""
        return None
