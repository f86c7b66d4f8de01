"""load=safetensors: a checkpoint folder, one file or sharded with an index, local or from the Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pipeline.ground import hub
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.report import Finding
from pipeline.ground.shards import Shard, read_checkpoint
from pipeline.ground.sidefiles import left_out, side_files
from pipeline.stage import Load, stage
from pipeline.weight import Checkpoint, ShardLayout, Stored


@stage("safetensors")
@dataclass(frozen=True, kw_only=True)
class Safetensors(Load):
    """A folder or hub id with config.json and safetensors."""

    def check(self) -> None:
        self()

    def __call__(self) -> Checkpoint[Stored]:
        origin = hub.locate("base_model", self.base_model, hub.CHECKPOINT, download=not self.dry_run)
        folder = origin.folder
        if not folder.is_dir():
            raise Refused(f"base_model: '{self.base_model}' is a file; give its folder, or a .gguf file")
        shards = read_checkpoint(folder)
        config, beside = ConfigFile(folder / "config.json"), side_files(folder, "base")
        unknown = left_out(folder, beside)
        return Checkpoint(
            weights=tuple(
                Stored(entry.name, entry.shape, entry.dtype, {"": entry})
                for shard in shards
                for entry in shard.entries
            ),
            shards=tuple(ShardLayout(s.file.path.name, tuple(e.name for e in s.entries), s) for s in shards),
            dtype=main_dtype(shards, config.read()),
            config=config,
            origin=origin,
            files=tuple(File.at(s.file.path) for s in shards),
            side_files=beside,
            findings=(Finding(f"left behind in the base's folder: {', '.join(unknown)}"),) if unknown else (),
        )


def main_dtype(shards: Iterable[Shard], config: Mapping[str, Any]) -> str:
    """The dtype of most elements among the plain floats; what config.json says where there are none."""
    elements: Counter[str] = Counter()
    for shard in shards:
        for entry in shard.entries:
            if entry.dtype in DENSE_FLOATS:
                elements[entry.dtype] += prod(entry.shape)
    if elements:
        return elements.most_common(1)[0][0]
    said = str(config.get("dtype") or config.get("torch_dtype"))
    return {"float32": "F32", "float16": "F16"}.get(said, "BF16")
