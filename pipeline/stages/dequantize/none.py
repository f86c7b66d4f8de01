"""dequantize=none: refuses a base that is not plain numbers already."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground.errors import Refused
from pipeline.stage import Dequantize, stage
from pipeline.stages.dequantize.auto import dense, plain
from pipeline.weight import Checkpoint, Stored, Weight


@stage("none")
@dataclass(frozen=True, kw_only=True)
class NoDequantize(Dequantize):
    """Only a base of plain numbers, as it is."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        return dense(stored, _weight)


def _weight(stored: Stored) -> Weight:
    if weight := plain(stored):
        return weight
    codes = stored.parts[""].dtype
    raise Refused(f"dequantize: '{stored.name}' is stored as {codes} codes; use dequantize=auto")
