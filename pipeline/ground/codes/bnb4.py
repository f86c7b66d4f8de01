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
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground.codes.bnb4_state import LEVELS, Nested, State, check_levels, expect
from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.reading import each, num_bytes, reading, refusal, told
from pipeline.ground.codes.small_floats import pairs, unpaired
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = ("", ".absmax", ".quant_map")
_NESTED = (*_PLAIN, ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"


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


def decode(packed: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    """Bytes `(n,)` of whole blocks, the last perhaps short, to `(2n,)` float32."""
    values = unpaired(table, packed)
    whole = len(values) // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(absmax[:whole, None])
    values[whole * blocksize :].mul_(absmax[whole:])
    return values


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every tensor with a quant_state beside it."""

    def found(entry: Entry) -> Found:
        name, _, kind = entry.name.partition(_STATE)
        parts = _NESTED if name + ".nested_absmax" in tensors else _PLAIN
        missing = [name + part for part in parts if name + part not in tensors]
        if missing or kind not in LEVELS:
            lacks = f"there is no '{missing[0]}'" if missing else f"'{kind}' is neither nf4 nor fp4"
            raise refusal(entry, f"tells of a bitsandbytes weight, but {lacks}")
        weight, absmax, levels, *outer = (tensors[name + part] for part in parts)
        state = State.read(entry, kind)
        count, shape = prod(state.shape), list(state.shape)
        if not 0 <= weight.extent.length - (count + 1) // 2 < num_bytes(weight) or weight.shape[1:] != (1,):
            raise refusal(weight, f"is {told(weight)}, not a column of the {count} codes of {shape}")
        check_levels(levels, kind)
        blocks = -(-count // state.blocksize)
        nested = state.nested(outer[0], outer[1], blocks) if outer else None
        expect(absmax, "U8" if nested else "F32", blocks)
        code = Bnb4(state.shape, kind, state.blocksize, weight, absmax, (entry, levels), nested)
        return Found(name, code, weight)

    yield from each((entry for name, entry in tensors.items() if _STATE in name), found)
