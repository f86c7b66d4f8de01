"""What the base, run as a model, depends on: by it, runs of a sweep know that they mean the same one."""

from __future__ import annotations

from typing import Any

from pipeline.ground.identity import files_in
from pipeline.weight import Checkpoint, Weight


def of_base(base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> tuple[Any, ...]:
    """Weights with how they are decoded, files by size and time, config, and the room that a merge makes."""
    edits = merged.config_edits
    room = (edits.get("vocab_size"), len(edits.get("id2label", ())))
    beside = files_in(base.origin.folder)
    return base.weights, base.files, base.config.read(), dict(base.config_edits), beside, room
