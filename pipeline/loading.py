"""A checkpoint as its files hold it, whichever recipe key names it: safetensors in a folder, or GGUF."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from pipeline.ground import hub
from pipeline.ground.codes.code import Quantization
from pipeline.ground.codes.formats import detect
from pipeline.ground.codes.gguf import row_bytes
from pipeline.ground.codes.gguf_code import GgufCode
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.files import Extent, File
from pipeline.ground.gguf import GgufHeader, GgufTensor, read_gguf
from pipeline.ground.gguf_model import gguf_config, gguf_side_files
from pipeline.ground.gguf_names import hugging_face_name, transform
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.report import Finding
from pipeline.ground.shards import Entry, Shard, read_checkpoint
from pipeline.ground.sidefiles import QUANTIZATION_FILES, left_out, side_files
from pipeline.ground.tables import read_table
from pipeline.weight import Checkpoint, ShardLayout, Stored


def is_gguf(value: str) -> bool:
    """Whether it names a .gguf file, or a folder that holds one and no safetensors."""
    path = Path(os.path.expanduser(value))  # noqa: PTH111  ~nobody is a name
    if path.suffix == ".gguf":
        return True
    return path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors*"))


def load_checkpoint(key: str, value: str, *, download: bool = True) -> Checkpoint[Stored]:
    """The checkpoint that a recipe key names, in whichever format it is."""
    return (load_gguf if is_gguf(value) else load_safetensors)(key, value, download=download)


def load_safetensors(key: str, value: str, *, download: bool = True) -> Checkpoint[Stored]:
    """A folder or hub id with config.json and safetensors, one file or sharded with an index."""
    origin = hub.locate(key, value, hub.CHECKPOINT, download=download)
    folder = origin.folder
    if not folder.is_dir():
        raise Refused(f"{key}: '{value}' is a file; give its folder, or a .gguf file")
    shards = read_checkpoint(folder)
    config, beside = ConfigFile(folder / "config.json"), side_files(folder, "base")
    unknown = left_out(folder, beside)
    weights, dtype, layout = _weights(key, shards, config, folder)
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
    key: str, shards: Sequence[Shard], config: ConfigFile, folder: Path
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
        raise Refused(*(f"{key}: {sentence}" for sentence in refusal.sentences)) from None
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


def load_gguf(key: str, value: str, *, download: bool = True) -> Checkpoint[Stored]:
    """A .gguf file, or a folder that holds one, under Hugging Face names and in its order of rows."""
    origin = hub.locate(key, value, hub.CHECKPOINT, download=download)
    path = _the_file(key, origin.folder)
    header = read_gguf(path)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise Refused(f"{path}: its metadata lack general.architecture")
    file = File.at(path)
    weights: list[Stored] = []
    left_out, wrong = [], []
    for tensor in header.tensors:
        try:
            name = hugging_face_name(architecture, tensor.name)
            if name is None:
                left_out.append(tensor.name)
            else:
                weights.append(_stored(name, tensor, header, architecture, file))
        except Refused as refusal:
            wrong += [f"{path}: {sentence}" for sentence in refusal.sentences]
    if wrong:
        raise Refused(*dict.fromkeys(wrong))
    findings = [Finding(f"{name} is left out: rope_parameters in the config say it") for name in left_out]
    return Checkpoint(
        weights=tuple(weights),
        shards=(),
        dtype="BF16",
        config=gguf_config(header),
        origin=origin,
        files=(file,),
        side_files=gguf_side_files(header),
        findings=tuple(findings),
    )


def _the_file(key: str, path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise Refused(f"{key}: '{path}' should hold one GGUF file, but holds {names}; give the file")
    return found[0]


def _stored(name: str, tensor: GgufTensor, header: GgufHeader, architecture: str, file: File) -> Stored:
    if not tensor.shape:
        raise Refused(f"tensor '{tensor.name}' has no dimensions")
    row_bytes(tensor.type, tensor.shape[-1])  # refuses what cannot be decoded
    change = transform(architecture, tensor.name, header.metadata)
    rows = prod(tensor.shape[:-1])
    if change and rows % change.grain:
        raise Refused(f"tensor '{tensor.name}' has {rows} rows, which are no heads of {change.grain}")
    entry = Entry(tensor.name, tensor.type, tensor.shape, Extent(file, tensor.offset, tensor.length))
    return Stored(name, tensor.shape, "BF16", GgufCode(tensor.shape, entry, change))
