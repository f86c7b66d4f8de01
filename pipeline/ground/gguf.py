"""The GGUF format: its header read strictly, within bounds, and no byte beyond it.

Format: magic, version, counts, metadata, table of tensors, padding, tensors (ggml `docs/gguf.md`;
llama.cpp's `ggml/src/gguf.cpp` for what a reader refuses). Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from pipeline.ground.errors import Refused
from pipeline.ground.files import File, read_into

MAX_HEADER = 64 << 20  # several times what the largest vocabulary needs: all that a crafted file can cost
MAX_DIMENSIONS = 4
_CHUNK = 1 << 20
_LEAST_KEY, _LEAST_TENSOR, _LEAST_TEXT = 13, 24, 8  # bytes that the smallest of them takes

# value type: its code in `struct`
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

# tensor type: its name, elements per block, bytes per block (`ggml_type`; the gaps were withdrawn)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: type name, shape as PyTorch means it (out, in), its bytes in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the data: metadata (text, numbers, arrays of them) and tensors in table order."""

    path: Path
    metadata: dict[str, object]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file; Refused if it is truncated, malformed, big-endian, split or not GGUF.

    Arrays of numbers come as `array.array`, arrays of texts and of booleans as tuples.
    """
    try:
        file = File.at(path)
        if not path.is_file():
            raise Refused(f"{path}: is not a file; give a GGUF file")
        with file.opened() as descriptor:
            return _read(_Cursor(file, descriptor))
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: a text in its GGUF header is not UTF-8: {error.object[:40]!r}") from None


def _read(cursor: _Cursor) -> GgufHeader:
    _check_version(cursor)
    num_tensors, num_keys = cursor.numbers("Q", 2)
    metadata = _read_metadata(cursor, num_keys)
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise cursor.refusal(
            f"its split.count is {parts}: this is one part of a split file; "
            "merge the parts first with llama.cpp's `llama-gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.refusal(f"its general.alignment is {alignment!r}, which is not a power of two")
    table = _read_table(cursor, num_tensors)
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_place(cursor, alignment, start, *row) for row in table)
    in_order = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.length))
    for one, following in pairwise(in_order):
        if one.offset + one.length > following.offset:
            raise cursor.refusal(f"its tensors '{one.name}' and '{following.name}' overlap")
    return GgufHeader(cursor.file.path, metadata, tensors)


def _check_version(cursor: _Cursor) -> None:
    cursor.require(min(cursor.file.size, 8))
    if cursor.buffer.startswith(b"version "):
        raise cursor.refusal("is a git-lfs pointer, not the weights; run `git lfs pull`")
    if not cursor.buffer.startswith(b"GGUF"):
        raise cursor.refusal(f"is not a GGUF file: it starts with {cursor.buffer[:4]!r}, not with b'GGUF'")
    _, version = cursor.numbers("I", 2)
    if version in (2 << 24, 3 << 24):
        raise cursor.refusal("is a big-endian GGUF file; convert it to little-endian first")
    if version not in (2, 3):
        raise cursor.refusal(f"is GGUF version {version}; convert it to version 2 or 3 with llama.cpp")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    cursor.require_room(count, _LEAST_KEY, "metadata keys")
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise cursor.refusal(f"its metadata key '{key}' stands twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> object:
    (kind,) = cursor.numbers("I", 1)
    if kind in _NUMBERS:
        return cursor.numbers(_NUMBERS[kind], 1)[0]
    if kind == _TEXT:
        return cursor.text()
    if kind != _ARRAY:
        raise cursor.refusal(f"its metadata key '{key}' has value type {kind}; 0 to 12 exist")
    (kind,) = cursor.numbers("I", 1)
    (count,) = cursor.numbers("Q", 1)
    if kind == _TEXT:
        return cursor.texts(count)
    if kind not in _NUMBERS:
        raise cursor.refusal(f"its metadata key '{key}' is an array of value type {kind}, which cannot be")
    return cursor.values(_NUMBERS[kind], count)


def _read_table(cursor: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    cursor.require_room(count, _LEAST_TENSOR, "tensors")
    table, names = [], set()
    for _ in range(count):
        name = cursor.text()
        if name in names:
            raise cursor.refusal(f"its tensor '{name}' stands twice")
        names.add(name)
        (dimensions,) = cursor.numbers("I", 1)
        if dimensions > MAX_DIMENSIONS:
            raise cursor.refusal(f"its tensor '{name}' has {dimensions} dimensions; GGUF has at most 4")
        shape = cursor.numbers("Q", dimensions)[::-1]  # ggml names the fastest dimension first
        (kind,) = cursor.numbers("I", 1)
        (offset,) = cursor.numbers("Q", 1)
        table.append((name, shape, kind, offset))
    return table


def _place(
    cursor: _Cursor, alignment: int, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    if kind not in TYPES:
        raise cursor.refusal(f"its tensor '{name}' has type {kind}, which this version does not know")
    type_name, num_elements, num_bytes = TYPES[kind]
    if (shape[-1] if shape else 1) % num_elements:
        raise cursor.refusal(
            f"its tensor '{name}' {list(shape)} does not fill {type_name} blocks of {num_elements}"
        )
    if offset % alignment:
        raise cursor.refusal(f"its tensor '{name}' lies at {offset}, which is not a multiple of {alignment}")
    length = prod(shape) // num_elements * num_bytes
    missing = start + offset + length - cursor.file.size
    if missing > 0:
        raise cursor.refusal(f"is truncated: {missing} bytes of tensor '{name}' are missing; fetch it again")
    return GgufTensor(name, type_name, shape, start + offset, length)


class _Cursor:
    """A place in the header; the bytes up to it are read in growing chunks, never beyond MAX_HEADER."""

    def __init__(self, file: File, descriptor: int) -> None:
        self.file = file
        self.descriptor = descriptor
        self.buffer = b""
        self.at = 0

    def refusal(self, wrong: str) -> Refused:
        return Refused(f"{self.file.path}: {wrong}")

    def require(self, count: int) -> None:
        """Reads until the next `count` bytes are in the buffer."""
        stop = self.at + count
        if stop <= len(self.buffer):
            return
        if stop > self.file.size:
            raise self.refusal(
                f"ends within its header, which wants {count} bytes at {self.at}; fetch it again"
            )
        if stop > MAX_HEADER:
            raise self.refusal(f"its header is longer than {MAX_HEADER} bytes, which no vocabulary needs")
        wanted = min(max(stop, 2 * len(self.buffer), _CHUNK), self.file.size, MAX_HEADER)
        more = bytearray(wanted - len(self.buffer))
        read_into(self.descriptor, len(self.buffer), memoryview(more))
        self.buffer += more

    def require_room(self, count: int, least: int, what: str) -> None:
        """Refuses a count that cannot be true, before anything is allocated for it."""
        room = min(self.file.size, MAX_HEADER) - self.at
        if count * least > room:
            raise self.refusal(f"claims {count} {what}, which the {room} bytes left for them cannot hold")

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        size = struct.calcsize(layout)
        self.require(size)
        self.at += size
        return struct.unpack_from(layout, self.buffer, self.at - size)

    def values(self, code: str, count: int) -> array[Any] | tuple[Any, ...]:
        width = struct.calcsize(f"<{code}")
        self.require_room(count, width, "values in an array")
        if code == "?":
            return self.numbers(code, count)
        self.require(count * width)
        self.at += count * width
        return array(code, self.buffer[self.at - count * width : self.at])

    def text(self) -> str:
        (length,) = self.numbers("Q", 1)
        self.require(length)
        self.at += length
        return self.buffer[self.at - length : self.at].decode()

    def texts(self, count: int) -> tuple[str, ...]:
        """As `text`, `count` times: vocabulary and merges are most of a header, hence the plain loop."""
        self.require_room(count, _LEAST_TEXT, "texts in an array")
        texts: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(texts) < count:
            texts.append(self.text())  # reads on when the loop below has come to the end of the buffer
            buffer, at, end = self.buffer, self.at, len(self.buffer)
            for _ in range(count - len(texts)):
                start = at + 8
                stop = start + length_at(buffer, at)[0] if start <= end else end + 1
                if stop > end:
                    break
                texts.append(buffer[start:stop].decode())
                at = stop
            self.at = at
        return tuple(texts)
