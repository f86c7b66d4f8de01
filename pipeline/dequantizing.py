"""From what files hold to the dense weights it means: plain numbers as they are, codes in float32."""

from __future__ import annotations

from dataclasses import fields

from pipeline.ground.model_config import QUANTIZATION_KEYS
from pipeline.ground.shards import Entry
from pipeline.weight import Checkpoint, Decoded, Dense, Stored, Weight


def dense(stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
    """The checkpoint of dense weights, whose config no longer says that it is quantized."""
    parts = {f.name: getattr(stored, f.name) for f in fields(stored)}
    parts["weights"] = tuple(_weight(weight) for weight in stored.weights)
    if stored.config.quantization_config:
        parts["config_edits"] = {**stored.config_edits, QUANTIZATION_KEYS[0]: None}
    return Checkpoint(**parts)


def _weight(stored: Stored) -> Weight:
    if isinstance(stored.held, Entry):
        return Dense(stored.name, stored.shape, stored.dtype, stored.held)
    return Decoded(stored.name, stored.shape, stored.dtype, stored.held)
