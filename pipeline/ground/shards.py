"""The safetensors format: a header read strictly, an index, and a header laid out for writing.

Format: eight bytes of header length, a JSON header, then the tensors without holes or overlaps
(safetensors README, "Format"). What two readers could understand differently is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.ground import dtypes
from pipeline.ground.errors import Refused
from pipeline.ground.files import Extent, File, read_into
from pipeline.ground.tables import parse_table, read_table

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its dtype's safetensors name (or GGUF type), shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file: its tensors in the order of their bytes."""

    file: File
    header: bytes
    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file; Refused if it is truncated, ambiguous or malformed."""
    try:
        return _read_shard(File.at(path))
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None


@lru_cache(maxsize=4096)
def _read_shard(file: File) -> Shard:
    with file.opened() as descriptor:
        first = bytearray(min(file.size, 8))
        read_into(descriptor, 0, memoryview(first))
        length = int.from_bytes(first, "little")
        if first.startswith(b"version "):
            raise Refused(f"{file.path}: is a git-lfs pointer, not the weights; run `git lfs pull`")
        if len(first) < 8 or length > MAX_HEADER or 8 + length > file.size:
            raise Refused(f"{file.path}: is truncated or not a safetensors file; fetch it again")
        header = bytearray(8 + length)
        read_into(descriptor, 0, memoryview(header))
    table = parse_table(bytes(header[8:]), f"{file.path}: its safetensors header")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(f"{file.path}: its safetensors header is not a table of tensors and text")
    entries = [_entry(file, 8 + length, name, spec) for name, spec in table.items()]
    entries.sort(key=lambda e: (e.extent.offset, e.extent.offset + e.extent.length))
    end = 8 + length
    for entry in entries:
        if entry.extent.offset != end:
            raise Refused(f"{file.path}: tensor '{entry.name}' leaves a hole or overlaps another one")
        end += entry.extent.length
    if end > file.size:
        raise Refused(f"{file.path}: is truncated: {end - file.size} bytes are missing; fetch it again")
    if end < file.size:
        raise Refused(f"{file.path}: {file.size - end} bytes follow its last tensor")
    return Shard(file, bytes(header), metadata, tuple(entries))


def _entry(file: File, start: int, name: str, spec: Any) -> Entry:
    where = f"{file.path}: tensor '{name}'"
    if not name.isprintable():
        raise Refused(f"{file.path}: tensor {name!r} has a name that cannot be printed")
    try:
        dtype, shape, (begin, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise Refused(f"{where} lacks dtype, shape or data_offsets") from None
    numbers = (*shape, begin, end)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise Refused(f"{where} has a shape or offset that is not a natural number")
    if not isinstance(dtype, str) or not dtypes.known(dtype):
        raise Refused(f"{where} has dtype {dtype!r}, which this version does not know")
    if dtypes.num_bytes(dtype, shape) != end - begin:
        raise Refused(f"{where} has {end - begin} bytes, which is not {dtype} {list(shape)}")
    return Entry(name, dtype, shape, Extent(file, start + begin, end - begin))


def read_checkpoint(folder: Path) -> tuple[Shard, ...]:
    """The shards of a checkpoint folder as its index names them; Refused if index and shards differ."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() and SINGLE not in _indexed_shards(index):
        return (read_shard(folder / SINGLE),)  # as transformers: a single file comes before an index
    if index.is_file():
        return _read_indexed(folder, index)
    if (folder / "adapter_config.json").is_file():
        raise Refused(f"{folder}: holds an adapter, not a model; give it as adapter=")
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) > 1:
        raise Refused(f"{folder}: holds {len(found)} safetensors files but no {INDEX} that says which count")
    if found:
        raise Refused(f"{folder}: holds {found[0]} but neither {SINGLE} nor {INDEX}; rename it to {SINGLE}")
    raise Refused(_no_weights(folder))


def _indexed_shards(index: Path) -> set[str]:
    return set(_weight_map(index).values()) if index.is_file() else set()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_table(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index}: has no weight_map, a table of tensor names and files")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard
        if not plain or "\\" in shard:
            raise Refused(f"{index}: '{name}' lies in {shard!r}, which is not a plain safetensors file name")
    return weight_map


def _read_indexed(folder: Path, index: Path) -> tuple[Shard, ...]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Refused(f"{index}: names {missing[0]}, which is not in the folder ({len(missing)} missing)")
    shards = tuple(read_shard(folder / name) for name in names)
    for shard in shards:
        held = {entry.name for entry in shard.entries}
        promised = {name for name, file in weight_map.items() if file == shard.file.path.name}
        if held != promised:
            odd = min(held ^ promised)
            says = "lacks" if odd in promised else "holds"
            raise Refused(f"{shard.file.path}: {says} tensor '{odd}', unlike {index.name} says")
    return shards


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        return (
            f"{folder}: holds its weights as pickles ({pickles[0]}), which can run code; "
            "convert them to safetensors first"
        )
    if not any(folder.iterdir()):
        return f"{folder}: is empty; a checkpoint folder holds config.json and {SINGLE}"
    return f"{folder}: holds no weights ({SINGLE}, or {INDEX} with its shards)"


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a shard to be written; `offset` counts from the start of the file.

    A `late` one has at most these bytes, and lies behind those that are not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    late: bool = False


def lay_out(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], room: int = 0
) -> tuple[bytes, tuple[Slot, ...]]:
    """The header (with its length) and the places of these (name, dtype, shape), in their order.

    Where that order would leave a tensor unaligned for its dtype, wider dtypes come first. The header is
    filled up with spaces to `room` bytes.
    """
    placed = _place(tensors)
    if any(begin % dtypes.alignment(dtype) for _, dtype, _, begin, _ in placed):
        placed = _place(sorted(tensors, key=lambda t: -dtypes.alignment(t[1])))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, dtype, shape, begin, end in placed:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    start = 8 + len(text)
    slots = tuple(Slot(n, d, s, start + begin, end - begin) for n, d, s, begin, end in placed)
    return len(text).to_bytes(8, "little") + text, slots


def _place(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    placed, end = [], 0
    for name, dtype, shape in tensors:
        length = dtypes.num_bytes(dtype, shape)
        assert length is not None
        placed.append((name, dtype, shape, end, end + length))
        end += length
    return placed


def index_text(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> str:
    """The text of model.safetensors.index.json; sizes in bytes and elements."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    table = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(table, indent=2) + "\n"
