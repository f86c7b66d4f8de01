"""LN tuning: the file holds the norm layers, which were trained whole (Zhao et al., arXiv:2312.11420)."""

from __future__ import annotations

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.kind import Kind, Trained, check_floats
from pipeline.ground.deltas.saved import Saved

_PARAMETERS = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}


def read(trained: Trained) -> list[Delta]:
    """The trained weight and, where the layer has one, bias, instead of the base's."""
    _ = trained["ln_tuning_layers.weight"]
    check_floats(trained, *trained.tensors.values())
    return [
        Saved(trained.module, _PARAMETERS[suffix], entry.shape, entry)
        for suffix, entry in trained.tensors.items()
    ]


KIND = Kind(peft_type="LN_TUNING", tensors=tuple(_PARAMETERS), fields=frozenset(), read=read)
