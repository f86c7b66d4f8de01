"""dequantize=none: refuses a base that is not plain numbers already."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ground import dtypes
from pipeline.ground.errors import Refused
from pipeline.stage import Dequantize, stage
from pipeline.stages.dequantize.auto import dense
from pipeline.weight import Checkpoint, Dense, Stored, Weight


@stage("none")
@dataclass(frozen=True, kw_only=True)
class NoDequantize(Dequantize):
    """Only a base of plain numbers, as it is."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        return dense(stored, _weight)


def _weight(stored: Stored) -> Weight:
    entry = stored.parts[""]
    if stored.transform is None and entry.dtype == stored.dtype and dtypes.known(entry.dtype):
        return Dense(stored.name, stored.shape, stored.dtype, entry)
    raise Refused(f"dequantize: '{stored.name}' is stored as {entry.dtype} codes; use dequantize=auto")
