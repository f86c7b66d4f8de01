"""merge=linear: W + the weighted sum of all adapters' deltas, as exact has it, or their weighted mean.

It is the sum of the full deltas; PEFT's add_weighted_adapter sums A and B apart, which gives cross terms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.stage import stage
from pipeline.stages.merge.exact import Exact
from pipeline.weight import Merging


@stage("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Exact):
    """Base plus the weighted sum of adapters."""

    normalize: bool = False
    """divide the adapters' weights by their sum"""

    @property
    def merging(self) -> Merging:
        return replace(super().merging, normalize=self.normalize)
