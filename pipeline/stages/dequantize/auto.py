"""dequantize=auto: the checkpoint as it is; plain numbers pass through, codes are decoded in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from pipeline.ground import dtypes
from pipeline.ground.codes import gguf
from pipeline.ground.errors import Refused
from pipeline.stage import Dequantize, stage
from pipeline.weight import Checkpoint, Decoded, Dense, Stored, Weight


def dense(checkpoint: Checkpoint[Stored], weight: Callable[[Stored], Weight]) -> Checkpoint[Weight]:
    """The checkpoint with each stored weight as what `weight` makes of it; all refusals at once."""
    if method := checkpoint.config.quantization:
        raise Refused(
            f"base_model: {checkpoint.origin.asked} is quantized ({method}), which this version cannot "
            "decode; give the model in 16 bits, or as a GGUF file"
        )
    made: list[Weight] = []
    wrong: list[str] = []
    for stored in checkpoint.weights:
        try:
            made.append(weight(stored))
        except Refused as refusal:
            wrong += refusal.sentences
    if wrong:
        raise Refused(*wrong)
    parts = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    return Checkpoint(**{**parts, "weights": tuple(made)})


@stage("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Dequantize):
    """Every weight as its own file holds it."""

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        return dense(stored, _weight)


def plain(stored: Stored) -> Dense | None:
    """The weight, if its file holds it as plain numbers in their place."""
    entry = stored.parts[""]
    if stored.transform is None and entry.dtype == stored.dtype and dtypes.known(entry.dtype):
        return Dense(stored.name, stored.shape, stored.dtype, entry)
    return None


def _weight(stored: Stored) -> Weight:
    entry = stored.parts[""]
    if weight := plain(stored):
        return weight
    if entry.dtype in gguf.BLOCKS:
        return Decoded(stored.name, stored.shape, stored.dtype, entry, gguf.decode, stored.transform)
    raise Refused(f"{stored.name}: this version has no decoder for {entry.dtype}")
