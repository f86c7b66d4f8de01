"""merge=linear: W + the weighted sum of all adapters' deltas, as exact has it, or their weighted mean.

It is the sum of the full deltas; PEFT's add_weighted_adapter sums A and B apart, which gives cross terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.merging import normalized
from pipeline.stage import stage
from pipeline.stages.merge.exact import Exact
from pipeline.weight import Adapter, Checkpoint, Weight


@stage("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Exact):
    """Base plus the weighted sum of adapters."""

    normalize: bool = False
    """divide the adapters' weights by their sum"""

    def __call__(self, base: Checkpoint[Weight], adapter: Adapter) -> Checkpoint[Weight]:
        return super().__call__(base, normalized(adapter) if self.normalize else adapter)
