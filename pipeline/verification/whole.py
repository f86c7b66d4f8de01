"""Models that are in memory whole, in float32: base, fine-tune, and what the output's files hold."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pipeline.ground.model_config import QUANTIZATION_KEYS, ConfigFile, edited
from pipeline.ground.predicting import Load
from pipeline.ground.written import Written
from pipeline.verification.base_as_model import with_room
from pipeline.weight import Checkpoint, Output, Weight

_ALIGNMENT = 64  # bytes; torch's own on CPUs


class Whole:
    """How to get them."""

    def base(self, base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> Load:
        """From its folder or decoded weights, with the room for new tokens that the merge makes."""
        return lambda cls: _base(cls, base, merged)

    def folder(self, output: Output) -> Load:
        """What stands in the output's folder; codes are decoded here and not by the loader."""
        return lambda cls: _folder(cls, output)


def _base(cls: Any, base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> Any:
    edits = merged.config_edits
    if all(weight.source is not None for weight in base.weights):
        labels = {"num_labels": len(edits["id2label"])} if "id2label" in edits else {}
        return with_room(_from_folder(cls, base.origin.folder, labels), merged)
    state = {}
    for weight in base.weights:
        with weight.open("cpu") as tiles:
            state[weight.name] = tiles(0, weight.num_rows).value.float().view(weight.shape)
    return with_room(_from_state(cls, edited(base.config.read(), base.config_edits), state), merged)


def _folder(cls: Any, output: Output) -> Any:
    if not any(weight.codes for weight in output.plan.weights):
        return _from_folder(cls, output.folder, {})
    folder = Written(output.folder)
    state = {
        w.name: folder.rows(w.name, 0, prod(w.shape[:-1])).float().view(w.shape) for w in output.plan.weights
    }
    config = ConfigFile(output.folder / "config.json").read()
    return _from_state(cls, edited(config, {QUANTIZATION_KEYS[0]: None}), state)


def _from_folder(cls: Any, folder: Path, labels: Mapping[str, Any]) -> Any:
    import torch

    return _aligned(cls.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **labels))


def _from_state(cls: Any, config: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig

    made = AutoConfig.for_model(**config)
    return _aligned(cls.from_pretrained(None, config=made, state_dict=state, dtype=torch.float32))


def _aligned(model: Any) -> Any:
    """With all tensors where torch would put them: the last bits of a product depend on their addresses.

    What a file holds in float32 would lie in the mapped file, wherever it is there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model
