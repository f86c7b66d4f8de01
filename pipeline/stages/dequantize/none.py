"""dequantize=none: refuses a base that is not plain numbers already."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.dequantizing import dense
from pipeline.ground.codes.code import Code
from pipeline.ground.errors import Refused
from pipeline.stage import Dequantize, stage
from pipeline.weight import Checkpoint, Stored, Weight


@stage("none")
@dataclass(frozen=True, kw_only=True)
class NoDequantize(Dequantize):
    """Only a base of plain numbers, as it is."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        for weight in stored.weights:
            if isinstance(weight.held, Code):
                raise Refused(
                    f"dequantize: '{weight.name}' is stored as {weight.held.describe} codes; "
                    "use dequantize=auto"
                )
        return dense(stored)
