"""load=safetensors: a checkpoint folder, one file or sharded with an index, local or from the Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.ground import hub
from pipeline.ground.codes.code import Quantization
from pipeline.ground.codes.formats import detect
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.report import Finding
from pipeline.ground.shards import Shard, read_checkpoint
from pipeline.ground.sidefiles import QUANTIZATION_FILES, left_out, side_files
from pipeline.ground.tables import read_table
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
        weights, dtype, layout = _weights(shards, config, folder)
        return Checkpoint(
            weights=weights,
            shards=layout,
            dtype=dtype,
            config=config,
            origin=origin,
            files=tuple(File.at(s.file.path) for s in shards),
            side_files=beside,
            findings=(Finding(f"left behind in the base's folder: {', '.join(unknown)}"),) if unknown else (),
        )


def _weights(
    shards: Sequence[Shard], config: ConfigFile, folder: Path
) -> tuple[tuple[Stored, ...], str, tuple[ShardLayout, ...]]:
    """Every weight with what holds it, the checkpoint's dtype, and which weights lie in which shard."""
    said = config.read()
    quantization = Quantization(
        config.quantization_config,
        _beside(folder),
        {key: text for shard in shards for key, text in shard.metadata.items()},
        _said_dtype(said),
    )
    tensors = {entry.name: entry for shard in shards for entry in shard.entries}
    try:
        found, plain, _ = detect(tensors, quantization)
    except Refused as refusal:
        raise Refused(*(f"base_model: {sentence}" for sentence in refusal.sentences)) from None
    dtype = quantization.dtype if found else main_dtype(shards, said)
    by_main = {f.main.name: Stored(f.name, f.code.shape, dtype, f.code) for f in found}
    by_main |= {e.name: Stored(e.name, e.shape, e.dtype, e) for e in plain.values()}
    held = {s.file.path.name: [by_main[e.name] for e in s.entries if e.name in by_main] for s in shards}
    layout = [ShardLayout(s.file.path.name, tuple(w.name for w in held[s.file.path.name]), s) for s in shards]
    weights = (weight for some in held.values() for weight in some)
    return tuple(weights), dtype, tuple(shard for shard in layout if shard.weights)


def _beside(folder: Path) -> dict[str, Any]:
    """What older writers of quantized checkpoints put into a file of its own."""
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            return read_table(folder / name)
    return {}


def _said_dtype(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    levels = [config, inner if isinstance(inner, dict) else {}]
    said = next((level[k] for level in levels for k in ("dtype", "torch_dtype") if level.get(k)), None)
    return {"float32": "F32", "float16": "F16"}.get(str(said), "BF16")


def main_dtype(shards: Iterable[Shard], config: Mapping[str, Any]) -> str:
    """The dtype of most elements among the plain floats; what config.json says where there are none."""
    elements: Counter[str] = Counter()
    for shard in shards:
        for entry in shard.entries:
            if entry.dtype in DENSE_FLOATS:
                elements[entry.dtype] += prod(entry.shape)
    if elements:
        return elements.most_common(1)[0][0]
    return _said_dtype(config)
