"""load=gguf: one GGUF file, under Hugging Face names and in Hugging Face's order of rows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.loading import load_gguf
from pipeline.stage import Load, stage
from pipeline.weight import Checkpoint, Stored


@stage("gguf")
@dataclass(frozen=True, kw_only=True)
class Gguf(Load):
    """A .gguf file, or a folder that holds one."""

    def check(self) -> None:
        self()

    def __call__(self) -> Checkpoint[Stored]:
        return load_gguf("base_model", self.base_model, download=not self.dry_run)
