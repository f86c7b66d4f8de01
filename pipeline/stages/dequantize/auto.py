"""dequantize=auto: the checkpoint as it is; plain numbers pass through, codes are decoded in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.dequantizing import dense
from pipeline.stage import Dequantize, stage
from pipeline.weight import Checkpoint, Stored, Weight


@stage("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Dequantize):
    """Every weight as its own file holds it."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        return replace(dense(stored), left_open=True)
