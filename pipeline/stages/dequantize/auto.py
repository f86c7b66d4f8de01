"""dequantize=auto: the checkpoint as it is; plain numbers pass through, codes are decoded in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.ground import dtypes
from pipeline.ground.codes import gguf
from pipeline.ground.errors import Refused
from pipeline.stage import Dequantize, stage
from pipeline.weight import Checkpoint, Decoded, Dense, Stored, Weight


def dense(checkpoint: Checkpoint[Stored], weight: Callable[[Stored], Weight]) -> Checkpoint[Weight]:
    """The checkpoint with each stored weight as what `weight` makes of it; all refusals at once."""
    made, wrong = [], []
    for stored in checkpoint.weights:
        try:
            made.append(weight(stored))
        except Refused as refusal:
            wrong += refusal.sentences
    if wrong:
        raise Refused(*wrong)
    return replace(checkpoint, weights=tuple(made))  # type: ignore[arg-type]


@stage("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Dequantize):
    """Every weight as its own file holds it."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        return dense(stored, _weight)


def _weight(stored: Stored) -> Weight:
    entry = stored.parts[""]
    if stored.transform is None and entry.dtype == stored.dtype and dtypes.known(entry.dtype):
        return Dense(stored.name, stored.shape, stored.dtype, entry)
    if entry.dtype in gguf.BLOCKS:
        return Decoded(stored.name, stored.shape, stored.dtype, entry, gguf.decode, stored.transform)
    raise Refused(f"{stored.name}: this version has no decoder for {entry.dtype}")
