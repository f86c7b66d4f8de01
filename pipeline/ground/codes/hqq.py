"""HQQ: codes of 1 to 8 bits with real-valued zero points, in planes of the weight one after another.

The weight, flat, is a matrix U of groups: `(numel / group, group)` with axis 1, `(group, numel / group)` with
axis 0. `W_q` holds its rows in as many planes as codes go into a byte, the first plane in the highest bits:
element f of the flat weight is in byte f mod size, plane f // size. Codes of 3 bits lie ten to an int32 from
bit 27 down, U filled up to ten equal planes. With `view_as_float` the bytes are stored as floats.

    W = (U - zero) * scale    each of the two rounded to the compute dtype

HQQ computes in `compute_dtype` (in the file; else the scales' dtype), so a value is rounded twice. The rows
here are those very numbers, which float32 holds exactly: rounded to the compute dtype they stay what they
are, and a delta is added to the weight that the model computed with.
Source: hqq 0.2.8.post1, `core/quantize.py` and `core/bitpack.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.parts import Parts, by_module, named, numbers, sibling
from pipeline.ground.codes.reading import Bytes, each, read_small, reading, refusal
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_PLANES = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
_DTYPES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32"}
_TOLD = {
    *("W_q", "scale", "zero", "bias", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype"),
    *("view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
}


@dataclass(frozen=True)
class HQQ(Code):
    """The codes of a linear layer, read by ranges of the flat weight."""

    packing: str
    axis: int
    dtype: str  # of the computation
    codes: Entry
    scale: Entry
    zero: Entry
    told: tuple[Entry, ...]  # what describes them

    @property
    def describe(self) -> str:
        group = prod(self.shape) // prod(self.scale.shape)
        return f"HQQ {_PLANES[self.packing][0]} bit, groups of {group}, axis {self.axis}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.codes, self.scale, self.zero, *self.told

    @property
    def state_bytes(self) -> int:
        return self.scale.extent.length + self.zero.extent.length

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        kind, columns = torch_dtype(self.dtype), self.shape[-1]
        scale, zero = (read_whole(entry, device).to(kind).flatten() for entry in (self.scale, self.zero))
        groups = len(scale)
        group = prod(self.shape) // groups
        run = group if self.axis else groups  # elements that lie in one row of U
        with reading(device, self.codes) as (read,):

            def rows(start: int, stop: int) -> Tensor:
                first, end = start * columns, stop * columns
                begin = first // run * run if self.axis else first  # whole groups, or as many as are asked
                until = -(-end // run) * run if self.axis else end
                planes = [codes.to(kind) for codes in self._planes(read, begin, until)]
                values = planes[0] if len(planes) == 1 else torch.cat([*planes, scale[:0]])
                if self.axis:
                    line = slice(begin // group, until // group)
                    values = values.view(-1, group).sub_(zero[line, None]).mul_(scale[line, None])
                    return values.view(-1)[first - begin : end - begin].float().view(stop - start, columns)
                at = begin
                while at < until:  # piece by piece of U's rows, whose columns are the groups
                    size = min(until, (at // run + 1) * run) - at
                    line = slice(at % run, at % run + size)
                    values[at - begin : at - begin + size].sub_(zero[line]).mul_(scale[line])
                    at += size
                return values.float().view(stop - start, columns)

            yield rows

    def _planes(self, read: Bytes, begin: int, until: int) -> Iterator[Tensor]:
        """The codes of a range of the flat weight, cut where planes end; uint8 or int32."""
        import torch

        bits, planes = _PLANES[self.packing]
        width = 4 if planes == 10 else 1
        size = self.codes.extent.length // width
        while begin < until:
            plane, at = divmod(begin, size)
            stop = min(until, (plane + 1) * size)
            raw = read(at * width, (at + stop - begin) * width)
            raw = raw.view(torch.int32) if planes == 10 else raw
            yield raw if planes == 1 else raw >> bits * (planes - 1 - plane) & 2**bits - 1
            begin = stop


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Modules with `W_q` and what hqq's state_dict tells of it."""
    modules = {p["W_q"].name: p for p in by_module(tensors).values() if "W_q" in p and "packing" in p}

    def found(main: Entry) -> Found:
        return Found(sibling(main, "weight"), _code(main, modules[main.name]), main)

    yield from each((parts["W_q"] for parts in modules.values()), found)


def _code(main: Entry, parts: Parts) -> HQQ:
    if missing := [part for part in ("scale", "zero", "shape", "axis") if part not in parts]:
        raise refusal(main, f"is HQQ, but stands without {' and '.join(missing)}")
    if strange := sorted(set(parts) - _TOLD):
        raise refusal(main, f"is HQQ with '{strange[0]}', which this version cannot decode")
    if any(read_small(parts[part]).strip(b"\0") for part in ("quant_scale", "quant_zero") if part in parts):
        raise refusal(main, "is HQQ with quantized scales or zero points, which this version cannot decode")
    packing, scale, zero = _text(parts["packing"]), parts["scale"], parts["zero"]
    dtype = _DTYPES.get(_text(parts["compute_dtype"]), "") if "compute_dtype" in parts else scale.dtype
    if packing not in _PLANES or dtype not in _DTYPES.values():
        raise refusal(
            main, f"is HQQ of packing {packing!r} computed in {dtype}, not {', '.join(_PLANES)} in floats"
        )
    shape, axis = tuple(numbers(parts["shape"])), numbers(parts["axis"])
    total, groups, planes = prod(shape), prod(scale.shape), _PLANES[packing][1]
    if len(shape) == 2 and min(shape) > 0 and axis in ([0], [1]) and groups and total % groups == 0:
        lines = groups if axis[0] else total // groups  # rows of U
        words = -(-lines // planes) * (total // lines)
        if (
            main.extent.length == words * (4 if planes == 10 else 1)
            and (lines % planes == 0 or planes == 10)
            and prod(zero.shape) == groups
            and {scale.dtype, zero.dtype} <= set(_DTYPES.values())
        ):
            told = tuple(e for part, e in parts.items() if part not in {"W_q", "scale", "zero", "bias"})
            return HQQ(shape, packing, axis[0], dtype, main, scale, zero, told)
    raise refusal(main, f"does not fit together as HQQ {packing} of shape {list(shape)}: {named(parts)}")


def _text(entry: Entry) -> str:
    """Characters stored as numbers."""
    return read_small(entry).decode("latin-1")
