"""bitsandbytes NF4 and FP4 written: `quantize_4bit` of 0.50.2 on a CPU, and what transformers saves of it.

A block's values over its absmax, clamped, go to the nearest of sixteen levels (a midpoint goes down). With
nested scales the absmax less their mean are themselves codes of a table of 256 levels, in blocks of 256; the
CPU kernel finds those by a table of 65536 steps, so that next to a midpoint it may take the other neighbour,
which the GPU kernel does not. The mean is torch's float32 mean, taken on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.bnb4 import Bnb4, decode
from pipeline.ground.codes.bnb4_state import LEVELS
from pipeline.ground.codes.code import Code, read_whole
from pipeline.ground.codes.encoders.encoder import Encode, Encoded, Encoder, Part, whole_rows
from pipeline.ground.codes.small_floats import pairs

if TYPE_CHECKING:
    from torch import Tensor

NESTED_BLOCK = 256
_BINS = 1024  # of [-1, 1], each with one midpoint between levels at most
_STEPS = 65535  # of the table by which the CPU kernel finds nested codes
_LEAST = 1e-38  # what bitsandbytes divides by where a block is zero
_WIDEST = 0.0141  # between neighbours of the nested levels
_ROOM = 32  # bytes of a float in JSON, at most


@dataclass(frozen=True)
class Bnb4Encoder(Encoder):
    """`storage` is dtype and shape of the tensor of codes; `dtype` what the model computes in: bfloat16."""

    kind: str
    blocksize: int
    nested: bool
    dtype: str
    storage: tuple[str, tuple[int, ...]] | None = None

    @property
    def describe(self) -> str:
        return f"bnb {self.kind} block {self.blocksize}{', nested scales' if self.nested else ''}"

    @property
    def blocks(self) -> int:
        return -(-prod(self.shape) // self.blocksize)

    @property
    def parts(self) -> tuple[Part, ...]:
        dtype, shape = self.storage or ("U8", ((prod(self.shape) + 1) // 2, 1))
        state = f"{self.name}.quant_state.bitsandbytes__{self.kind}"
        codes, levels = Part(self.name, dtype, shape), Part(f"{self.name}.quant_map", "F32", (16,))
        if not self.nested:
            absmax = Part(f"{self.name}.absmax", "F32", (self.blocks,))
            return (codes, absmax, levels, Part(state, "U8", (len(self._state()),)))
        return (
            codes,
            Part(f"{self.name}.absmax", "U8", (self.blocks,)),
            Part(f"{self.name}.nested_absmax", "F32", (-(-self.blocks // NESTED_BLOCK),)),
            levels,
            Part(f"{self.name}.nested_quant_map", "F32", (256,)),
            Part(state, "U8", (len(self._state(0.5)) + _ROOM,), late=True),
        )

    @property
    def grain(self) -> int:
        return whole_rows(self.shape[-1], self.blocksize)

    @property
    def state_bytes(self) -> int:
        return 8 * self.blocks

    def offset(self, row: int) -> int:
        return row * self.shape[-1] // 2

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        def encode(rows: Tensor, start: int, stream: int | None = None) -> Encoded:
            assert stream is None
            codes, absmax = quantized(rows.float().flatten(), self.kind, self.blocksize)
            return Encoded(packed(codes, self.kind), (absmax,))

        yield encode

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        table = pairs(LEVELS[self.kind], True, str(encoded.codes.device))
        values = decode(encoded.codes, encoded.sides[0], self.blocksize, table)
        rest = prod(self.shape) - start * self.shape[-1]  # without the nibble that an odd count leaves over
        return values[:rest].view(-1, self.shape[-1])

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        import torch

        absmax = torch.cat([side[0] for side in sides])
        levels = torch.tensor(LEVELS[self.kind])
        if not self.nested:
            return self._named(absmax, levels, _bytes(self._state()))
        codes, outer, offset = nested(absmax)
        return self._named(codes, outer, levels, nested_levels("cpu"), _bytes(self._state(offset)))

    def _named(self, *tensors: Tensor) -> dict[str, Tensor]:
        return {part.name: tensor for part, tensor in zip(self.parts[1:], tensors, strict=True)}

    def slack(self, code: Code) -> float:
        if not self.nested or not isinstance(code, Bnb4) or code.nested is None:
            return 0.0
        return _WIDEST / 2 * float(read_whole(code.nested.absmax).max())

    def _state(self, offset: float | None = None) -> str:
        state: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if offset is not None:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state)


def quantized(values: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes `(n,)` uint8 and absmax `(blocks,)` of float32 values `(n,)`, the last block perhaps short."""
    import torch

    full = len(values) // blocksize * blocksize
    absmax = absmax_of(values, blocksize)
    whole, rest = values[:full].view(-1, blocksize), values[full:]
    scaled = (whole * (1.0 / absmax[: len(whole)].clamp(min=_LEAST))[:, None]).flatten()
    if len(rest):
        scaled = torch.cat([scaled, rest / absmax[-1]])
    if not bool(absmax.isfinite().all()):  # told by whoever looks at the absmax
        scaled.nan_to_num_(nan=0.0)
    first, midpoints, order = _table(kind, str(values.device))
    scaled.clamp_(-1, 1)
    bins = _bins(scaled)
    codes = first.index_select(0, bins)
    codes += (scaled > midpoints.index_select(0, bins)).view(torch.uint8)
    return (codes if kind == "nf4" else order.index_select(0, codes.int())), absmax


def absmax_of(values: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude of every block of values `(n,)`, the last block perhaps short."""
    import torch

    full = len(values) // blocksize * blocksize
    whole, rest = values[:full].view(-1, blocksize), values[full:]
    absmax = torch.maximum(whole.amax(1), -whole.amin(1)).abs_() if full else values.new_empty(0)
    return torch.cat([absmax, rest.abs().max().clamp(min=_LEAST)[None]]) if len(rest) else absmax


def packed(codes: Tensor, kind: str) -> Tensor:
    """Two codes to a byte, high nibble first; an odd one is followed by the code of zero."""
    import torch

    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7 if kind == "nf4" else 0)])
    both = codes.view(torch.int16)  # the first one in the low byte
    return (both << 4 | both >> 8).to(torch.uint8)


def nested(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """The absmax as codes of `nested_levels`, the absmax of their blocks, and their mean."""
    import torch

    offset = absmax.mean()
    values = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK))
    blocks = values.view(-1, NESTED_BLOCK)
    outer = blocks.abs().amax(1)
    scaled = blocks.mul(1.0 / outer[:, None]).nan_to_num_(nan=-1.0).clamp_(-1, 1)
    steps = scaled.add_(1).mul_(0.5).mul_(_STEPS).add_(0.5).int()
    codes = _nested_table(str(absmax.device)).index_select(0, steps.flatten())
    return codes[: len(absmax)], outer, offset.item()


def unnested(codes: Tensor, outer: Tensor, offset: float) -> Tensor:
    """The absmax that nested codes mean: product and sum, each rounded."""
    blocks = outer.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return nested_levels(str(codes.device)).index_select(0, codes.int()).mul_(blocks).add_(offset)


@lru_cache(maxsize=8)
def nested_levels(device: str) -> Tensor:
    """The dynamic map of signed eight bits (bitsandbytes' `create_dynamic_map`), `(256,)` float32."""
    import torch

    levels = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2.0)
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _nested_table(device: str) -> Tensor:
    """The nested code of every step of [-1, 1], `(65536,)` uint8."""
    import torch

    levels = nested_levels("cpu")
    values = torch.arange(_STEPS + 1, dtype=torch.float32) / _STEPS * 2 - 1
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2).to(device, torch.uint8)


@lru_cache(maxsize=16)
def _table(kind: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """For every bin the rank of its lowest value and the midpoint in it; the codes by rank."""
    import torch

    levels = torch.tensor(LEVELS[kind])
    order = levels.argsort(stable=True)
    midpoints = (levels[order[:-1]] + levels[order[1:]]) / 2
    own = _bins(midpoints).long()
    assert len(set(own.tolist())) == len(own)
    first = (own < torch.arange(_BINS + 1)[:, None]).sum(1)
    inside = torch.full((_BINS + 1,), torch.inf)
    inside[own] = midpoints
    return first.to(device, torch.uint8), inside.to(device), order.to(device, torch.uint8)


def _bins(scaled: Tensor) -> Tensor:
    """The bin of every value of [-1, 1]; it never falls as the value rises."""
    return scaled.add(1).mul_(_BINS / 2).int()


def _bytes(text: str) -> Tensor:
    import torch

    return torch.tensor(list(text.encode()), dtype=torch.uint8)
