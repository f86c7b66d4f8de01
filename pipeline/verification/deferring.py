"""Models whose weights are read when they are used, from the base's files or from the output's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.dequantizing import dense
from pipeline.ground.deferred import tensors
from pipeline.ground.dtypes import INTEGERS, config_name
from pipeline.ground.model_config import ConfigFile, edited
from pipeline.ground.predicting import Load
from pipeline.ground.unread import Stream, Unread
from pipeline.loading import load_safetensors
from pipeline.verification.base_as_model import with_room
from pipeline.weight import Checkpoint, Output, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """How to get them, in float32, with weights that come from the stream."""

    stream: Stream

    def base(self, base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> Load:
        """From its files, with the room for new tokens that the merge makes."""
        edits = merged.config_edits
        whole = all(weight.source is not None for weight in base.weights)
        labels = {"num_labels": len(edits["id2label"])} if whole and "id2label" in edits else {}
        return lambda cls: with_room(_loaded(cls, base, self.stream, labels), merged)

    def folder(self, output: Output) -> Load:
        """What stands in the output's folder."""
        return lambda cls: _loaded(
            cls, dense(load_safetensors("output", str(output.folder))), self.stream, {}
        )


def _loaded(cls: Any, checkpoint: Checkpoint[Weight], stream: Stream, labels: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig

    if isinstance(checkpoint.config, ConfigFile) and not checkpoint.config_edits:
        folder = checkpoint.config.path.parent
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    else:
        config = AutoConfig.for_model(**edited(checkpoint.config.read(), checkpoint.config_edits))
    state = tensors(stream, {weight.name: _unread(weight) for weight in checkpoint.weights})
    with stream.loading():
        return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _unread(weight: Weight) -> Unread:
    @contextmanager
    def open_rows() -> Iterator[Callable[[int, int], Tensor]]:
        with weight.open("cpu") as tiles:
            yield lambda start, stop: tiles(start, stop).value

    dtype = config_name(weight.dtype) if weight.dtype in INTEGERS else "float32"
    return Unread(weight.shape, weight.grain, dtype, open_rows)
