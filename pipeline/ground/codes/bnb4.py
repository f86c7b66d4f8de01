"""bitsandbytes NF4 and FP4: four-bit codes of a table of sixteen levels, in blocks with a scale each.

`weight` (m, 1) U8, or any dtype of the same bytes (`quant_storage`): two codes to a byte, high nibble first,
row-major over the whole weight, so that blocks may straddle rows; the last one may be short, and an odd
count leaves a nibble over. `weight.quant_state.bitsandbytes__nf4` is JSON: shape, blocksize, dtype.
W[i] = level[code[i]] * absmax[i // blocksize]; `absmax` F32, or nested: U8 codes of `nested_quant_map`,
    absmax[j] = map[code[j]] * nested_absmax[j // nested_blocksize] + nested_offset, each step rounded.
Reference: `_dequantize_4bit_compute` of bitsandbytes' default backend. Its CPU kernel for AVX512 counts
blocks by rows and is wrong where a row is no multiple of the block (0.50.2); ours never does.
A Conv1D's weight is stored transposed, with its quant_state's shape (out, in); whoever knows the model
turns it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod
from struct import unpack
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.reading import each, num_bytes, read_small, reading, refusal, told
from pipeline.ground.codes.small_floats import pairs, unpaired
from pipeline.ground.shards import Entry
from pipeline.ground.tables import parse_table

if TYPE_CHECKING:
    from torch import Tensor

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
_STATE = ".quant_state.bitsandbytes__"
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Bnb4(Code):
    """Four-bit codes in blocks; with `nested`, the absmax of the blocks are codes too."""

    kind: str
    blocksize: int
    weight: Entry
    absmax: Entry
    beside: tuple[Entry, ...]  # the state and the table, which were read when it was found
    nested: Nested | None = None

    @property
    def describe(self) -> str:
        return f"bnb {self.kind} block {self.blocksize}{', nested scales' if self.nested else ''}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        nested = (self.nested.absmax, self.nested.levels) if self.nested else ()
        return (self.weight, self.absmax, *self.beside, *nested)

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        columns, size = self.shape[-1] if self.shape else 1, self.blocksize
        table, count = pairs(LEVELS[self.kind], True, device), prod(self.shape)
        with reading(device, self.weight) as (codes,), self._scales(device) as scales:

            def rows(start: int, stop: int) -> Tensor:
                begin, end = start * columns, stop * columns
                first, last = begin // size, -(-end // size)
                raw = codes(first * size // 2, (min(last * size, count) + 1) // 2)
                values = decode(raw, scales(first, last), size, table)
                return values[begin - first * size : end - first * size].view(stop - start, columns)

            yield rows

    @contextmanager
    def _scales(self, device: str) -> Iterator[Rows]:
        """scales(first, last): the absmax of these blocks, float32."""
        import torch

        if self.nested is None:
            with reading(device, self.absmax) as (plain,):
                yield lambda first, last: plain(4 * first, 4 * last).view(torch.float32)
            return
        nested, levels = self.nested, read_whole(self.nested.levels, device)
        with reading(device, self.absmax, nested.absmax) as (codes, outer):

            def scales(first: int, last: int) -> Tensor:
                low = first // nested.blocksize
                high = -(-last // nested.blocksize)
                blocks = torch.arange(first, last, device=device) // nested.blocksize - low
                absmax = outer(4 * low, 4 * high).view(torch.float32).index_select(0, blocks)
                # two operations, for a fused multiply-add would round once less
                return levels.index_select(0, codes(first, last).int()).mul_(absmax).add_(nested.offset)

            yield scales


@dataclass(frozen=True, slots=True)
class Nested:
    """How the absmax are quantized: a table of 256 levels, in blocks, around an offset."""

    absmax: Entry
    levels: Entry
    blocksize: int
    offset: float


def decode(packed: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    """Bytes `(n,)` of whole blocks, the last perhaps short, to `(2n,)` float32."""
    values = unpaired(table, packed)
    whole = len(values) // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(absmax[:whole, None])
    values[whole * blocksize :].mul_(absmax[whole:])
    return values


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every tensor with a quant_state beside it."""

    def found(state: Entry) -> Found:
        name, _, kind = state.name.partition(_STATE)
        missing = [name + part for part in ("", ".absmax", ".quant_map") if name + part not in tensors]
        if missing or kind not in LEVELS:
            lacks = f"there is no '{missing[0]}'" if missing else f"'{kind}' is neither nf4 nor fp4"
            raise refusal(state, f"tells of a bitsandbytes weight, but {lacks}")
        weight, absmax, levels = (tensors[name + part] for part in ("", ".absmax", ".quant_map"))
        told_by = _state(state, kind)
        shape, blocksize = tuple(told_by["shape"]), told_by["blocksize"]
        spare = weight.extent.length - (prod(shape) + 1) // 2
        if not 0 <= spare < num_bytes(weight) or weight.shape[1:] != (1,):
            raise refusal(
                weight, f"is {told(weight)}, not a column of the {prod(shape)} codes of {list(shape)}"
            )
        _expect(levels, "F32", 16)
        differ = zip(unpack("<16f", read_small(levels)), LEVELS[kind], strict=True)
        if not all(abs(one - other) <= 1e-6 for one, other in differ):  # as QuantState.__eq__ compares
            raise refusal(levels, f"is not the table of {kind}, by which bitsandbytes decodes")
        blocks = -(-prod(shape) // blocksize)
        nested = _nested(tensors, name, told_by, blocks) if name + ".nested_absmax" in tensors else None
        _expect(absmax, "U8" if nested else "F32", blocks)
        return Found(name, Bnb4(shape, kind, blocksize, weight, absmax, (state, levels), nested), weight)

    yield from each((entry for name, entry in tensors.items() if _STATE in name), found)


def _state(entry: Entry, kind: str) -> dict[str, Any]:
    """The JSON of a quant_state; Refused where it is not what bitsandbytes writes."""
    table = parse_table(read_small(entry), f"{entry.extent.file.path}: '{entry.name}'")
    shape = table.get("shape")
    sound = {
        "quant_type": table.get("quant_type") == kind,
        "shape": isinstance(shape, list) and bool(shape) and all(type(n) is int and n > 0 for n in shape),
        "blocksize": type(table.get("blocksize")) is int and table["blocksize"] in _BLOCKSIZES,
    }
    if wrong := [key for key, right in sound.items() if not right]:
        raise refusal(entry, f"has {wrong[0]} {table.get(wrong[0])!r}, which bitsandbytes does not write")
    return table


def _nested(tensors: Mapping[str, Entry], name: str, state: Mapping[str, Any], blocks: int) -> Nested:
    absmax, levels = tensors[name + ".nested_absmax"], tensors.get(name + ".nested_quant_map")
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if levels is None or state.get("nested_dtype") != "float32":
        lacks = f"there is no '{name}.nested_quant_map'" if levels is None else "nested_dtype is not float32"
        raise refusal(absmax, f"scales the scales of '{name}', but {lacks}")
    if type(blocksize) is not int or blocksize < 1 or type(offset) is not float or not isfinite(offset):
        raise refusal(absmax, f"stands beside nested_blocksize {blocksize!r} and nested_offset {offset!r}")
    _expect(levels, "F32", 256)
    _expect(absmax, "F32", -(-blocks // blocksize))
    return Nested(absmax, levels, blocksize, offset)


def _expect(entry: Entry, dtype: str, count: int) -> None:
    if (entry.dtype, entry.shape) == (dtype, (count,)):
        return
    packed = entry.dtype in ("BF16", "F16") or len(entry.shape) > 1
    why = "; bitsandbytes had packed it for a forward pass on a CPU when it was saved" if packed else ""
    raise refusal(entry, f"is {told(entry)}, not {dtype} [{count}]{why}")
