"""compressed-tensors' integers written: symmetric, with a scale for every group of columns, packed or plain.

Scales are amax / (2^bits - 1) * 2, rounded to their dtype first (`calculate_qparams`); codes the nearest
integers of value over scale, half to even, from -2^(bits-1) on. Packed codes lie as `pack_to_int32` has
them: a dense stream of bits, little-endian, each code 2^(bits-1) up. Kept scales and zero points are the
base's: what no delta moves keeps its very code, and what they do not reach is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground.codes.code import read_whole
from pipeline.ground.codes.compressed_tensors import Integers
from pipeline.ground.codes.encoders.encoder import Encode, Encoded, Encoder, Part
from pipeline.ground.codes.integers import scaled, unpacked
from pipeline.ground.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedEncoder(Encoder):
    """`pack-quantized`: codes of `bits` bits, `group` columns to a scale of `dtype`."""

    bits: int
    group: int
    dtype: str

    @property
    def describe(self) -> str:
        return f"int{self.bits} group {self.group}"

    @property
    def parts(self) -> tuple[Part, ...]:
        rows, columns = self.shape
        words = -(-columns * self.bits // 32)
        return (
            Part(f"{self.name}_packed", "I32", (rows, words)),
            Part(f"{self.name}_scale", self.dtype, (rows, -(-columns // self.group))),
            Part(f"{self.name}_shape", "I64", (2,)),
        )

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        import torch

        def encode(rows: Tensor, start: int, stream: int | None) -> Encoded:
            assert stream is None
            groups = rows.float().unflatten(1, (-1, self.group))
            scale = groups.abs().amax(2) / ((2**self.bits - 1) / 2)
            scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
            scale = scale.to(torch_dtype(self.dtype))
            low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            codes = (groups / scale.float()[:, :, None]).clamp_(low, high).round_().flatten(1)
            return Encoded(packed((codes - low).to(torch.uint8), self.bits), (scale,))

        yield encode

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        import torch

        codes = unpacked(encoded.codes.view(torch.uint8), self.bits, 2 ** (self.bits - 1))
        return scaled(codes[:, : self.shape[1]], encoded.sides[0].float(), None, self.group)

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        import torch

        _, scale, shape = (part.name for part in self.parts)
        return {scale: torch.cat([side[0] for side in sides]), shape: torch.tensor(self.shape)}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `(rows, columns)` uint8 below 2^bits as a stream of bits in words, `(rows, words)` int32."""
    import torch

    turns = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    if bits in (1, 2, 4, 8):
        per = 8 // bits
        some = turns.view(len(codes), -1, per)
        stream = some[:, :, 0].clone()
        for place in range(1, per):
            stream |= some[:, :, place] << place * bits
    else:
        word = turns[:, :, 0].long()
        for place in range(1, 8):
            word |= turns[:, :, place].long() << place * bits
        stream = torch.stack([(word >> 8 * i & 255).byte() for i in range(bits)], 2).flatten(1)
    length = -(-codes.shape[1] * bits // 32) * 4
    stream = torch.nn.functional.pad(stream, (0, max(length - stream.shape[1], 0)))[:, :length]
    return stream.contiguous().view(torch.int32)


@dataclass(frozen=True)
class KeptIntegers(Encoder):
    """Codes of a base of integers anew, over its own scales and zero points."""

    gathers: ClassVar[bool] = False

    base: Integers

    @property
    def describe(self) -> str:
        return self.base.describe

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(e.name, e.dtype, e.shape) for e in self.base.entries)

    @property
    def state_bytes(self) -> int:
        return self.base.state_bytes

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        import torch

        base, grid = self.base, self.base.grid
        scales = read_whole(base.scale, device).float().view(-1, grid.across)
        zeros = base.zeros(device)

        def encode(rows: Tensor, start: int, stream: int | None) -> Encoded:
            assert stream is None
            row = torch.arange(start, start + len(rows), device=device)
            line = row // grid.rows * grid.down + row % grid.rows // grid.height
            scale = scales.index_select(0, line)
            zero = torch.zeros_like(scale) if zeros is None else zeros.index_select(0, line)
            low, high = -(2 ** (base.bits - 1)), 2 ** (base.bits - 1) - 1
            values = _over(rows.float(), scale, zero, grid.width).clamp_(low, high).round_()
            codes = (
                packed((values - low).to(torch.uint8), base.bits) if base.packed else values.to(torch.int8)
            )
            return Encoded(codes, (scale, zero))

        yield encode

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        import torch

        if self.base.packed:
            bits = self.base.bits
            values = unpacked(encoded.codes.view(torch.uint8), bits, 2 ** (bits - 1))[:, : self.shape[-1]]
        else:
            values = encoded.codes.float()
        scale, zero = encoded.sides
        return scaled(values, scale, zero, self.base.grid.width)

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {entry.name: read_whole(entry) for entry in self.base.entries[1:]}


def _over(values: Tensor, scales: Tensor, zeros: Tensor, width: int) -> Tensor:
    """`values / scales + zeros`, each `width` columns with one of each, the last ones perhaps fewer."""
    columns = values.shape[1]
    scales, zeros = (t.repeat_interleave(width, 1)[:, :columns] for t in (scales, zeros))
    return values / scales + zeros
