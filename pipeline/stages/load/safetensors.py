"""load=safetensors: a checkpoint folder, one file or sharded with an index, local or from the Hub."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.loading import load_safetensors
from pipeline.stage import Load, stage
from pipeline.weight import Checkpoint, Stored


@stage("safetensors")
@dataclass(frozen=True, kw_only=True)
class Safetensors(Load):
    """A folder or hub id with config.json and safetensors."""

    def check(self) -> None:
        self()

    def __call__(self) -> Checkpoint[Stored]:
        return load_safetensors("base_model", self.base_model, download=not self.dry_run)
