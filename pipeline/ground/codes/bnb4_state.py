"""What a file tells of a bitsandbytes 4-bit weight: its levels, and the JSON of its quant_state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from struct import unpack
from typing import Any

from pipeline.ground.codes.reading import read_small, refusal, told
from pipeline.ground.shards import Entry
from pipeline.ground.tables import parse_table

_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(level / 12 for level in _FP4), *(-level / 12 for level in _FP4)),
}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Nested:
    """How the absmax are quantized: a table of 256 levels, in blocks, around an offset."""

    absmax: Entry
    levels: Entry
    blocksize: int
    offset: float


@dataclass(frozen=True, slots=True)
class State:
    """A quant_state: the shape of the dense weight and the size of a block; `fields` are all of it."""

    shape: tuple[int, ...]
    blocksize: int
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, entry: Entry, kind: str) -> State:
        """The state in a tensor of JSON; Refused where it is not what bitsandbytes writes for this kind."""
        fields = parse_table(read_small(entry), f"{entry.extent.file.path}: '{entry.name}'")
        shape, blocksize = fields.get("shape"), fields.get("blocksize")
        right = {
            "quant_type": fields.get("quant_type") == kind,
            "shape": isinstance(shape, list) and bool(shape) and all(type(n) is int and n > 0 for n in shape),
            "blocksize": type(blocksize) is int and blocksize in BLOCKSIZES,
        }
        if wrong := [key for key, is_right in right.items() if not is_right]:
            raise refusal(
                entry, f"has {wrong[0]} {fields.get(wrong[0])!r}, which bitsandbytes does not write"
            )
        return cls(tuple(fields["shape"]), fields["blocksize"], fields)

    def nested(self, absmax: Entry, levels: Entry, blocks: int) -> Nested:
        """How the scales of `blocks` blocks are quantized; Refused where the tensors do not fit."""
        size, offset, dtype = (self.fields.get(f"nested_{key}") for key in ("blocksize", "offset", "dtype"))
        sound = size in BLOCKSIZES and isinstance(offset, float) and isfinite(offset) and dtype == "float32"
        if not sound or size is None or offset is None:
            told_of = f"nested_blocksize {size!r}, nested_offset {offset!r} and nested_dtype {dtype!r}"
            raise refusal(absmax, f"stands beside {told_of}, which bitsandbytes does not write")
        expect(levels, "F32", 256)
        expect(absmax, "F32", -(-blocks // size))
        return Nested(absmax, levels, size, offset)


def check_levels(entry: Entry, kind: str) -> None:
    """Refused if a table is another than the one by which bitsandbytes decodes whatever the file holds."""
    expect(entry, "F32", 16)
    both = zip(unpack("<16f", read_small(entry)), LEVELS[kind], strict=True)
    if not all(abs(one - other) <= 1e-6 for one, other in both):  # as QuantState.__eq__ compares
        raise refusal(entry, f"is not the table of {kind}, by which bitsandbytes decodes")


def expect(entry: Entry, dtype: str, count: int) -> None:
    """Refused if a tensor is not `(count,)` of this dtype."""
    if (entry.dtype, entry.shape) == (dtype, (count,)):
        return
    packed = entry.name.endswith(".absmax") and (entry.dtype in ("BF16", "F16") or len(entry.shape) > 1)
    why = "; bitsandbytes had packed it for a forward pass on a CPU when it was saved" if packed else ""
    raise refusal(entry, f"is {told(entry)}, not {dtype} [{count}]{why}")
