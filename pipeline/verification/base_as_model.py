"""The base, run as a model: the room that a merge makes in it, and all that it depends on."""

from __future__ import annotations

from typing import Any

from pipeline.ground.identity import files_in
from pipeline.weight import Checkpoint, Weight


def with_room(model: Any, merged: Checkpoint[Weight]) -> Any:
    """The base with rows for the tokens that are new in the merge, the same random ones each time."""
    import torch

    if vocabulary := merged.config_edits.get("vocab_size"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def of_base(base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> tuple[Any, ...]:
    """By what runs of a sweep know that they mean the same one.

    Weights with how they are decoded, files by size and time, config, and the room that a merge makes.
    """
    edits = merged.config_edits
    room = (edits.get("vocab_size"), len(edits.get("id2label", ())))
    beside = files_in(base.origin.folder)
    return base.weights, base.files, base.config.read(), dict(base.config_edits), beside, room
