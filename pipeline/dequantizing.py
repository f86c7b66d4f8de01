"""From what files hold to the dense weights it means: plain numbers as they are, codes in float32."""

from __future__ import annotations

from dataclasses import fields

from pipeline.ground.codes.code import Code
from pipeline.ground.errors import Refused
from pipeline.ground.model_config import QUANTIZATION_KEYS
from pipeline.ground.names import is_conv1d
from pipeline.ground.shards import Entry
from pipeline.weight import Checkpoint, Decoded, Dense, Stored, Weight


def dense(stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
    """The checkpoint of dense weights, whose config no longer says that it is quantized."""
    turned = [w.name for w in stored.weights if _lies_turned(w, stored.config.model_type)]
    if turned:
        raise Refused(
            f"{stored.origin.asked}: {turned[0]} is a Conv1D weight of {stored.config.model_type}, which "
            f"quantizers hold transposed ({len(turned)} weights); this version does not turn it back, give "
            "the 16-bit model"
        )
    parts = {f.name: getattr(stored, f.name) for f in fields(stored)}
    parts["weights"] = tuple(_weight(weight) for weight in stored.weights)
    if stored.config.quantization_config:
        parts["config_edits"] = {**stored.config_edits, QUANTIZATION_KEYS[0]: None}
    return Checkpoint(**parts)


def _lies_turned(stored: Stored, model_type: str | None) -> bool:
    """Whether codes of it mean (out, in) where a 16-bit file holds (in, out)."""
    return isinstance(stored.held, Code) and is_conv1d(model_type, stored.name, stored.shape)


def _weight(stored: Stored) -> Weight:
    if isinstance(stored.held, Entry):
        return Dense(stored.name, stored.shape, stored.dtype, stored.held)
    return Decoded(stored.name, stored.shape, stored.dtype, stored.held)
