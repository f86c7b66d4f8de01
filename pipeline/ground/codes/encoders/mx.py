"""MXFP4 written again over the base's powers of two, in the layout of rows or that of gpt-oss's experts.

A value over its scale goes to the nearest E2M1 number, half to even, at most 6. A scale doubles, as often as
it must, only where a value would lie beyond 7, what rounds to the largest code: so what no delta moves
keeps its very code (OCP "Microscaling Formats (MX) 1.0").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.codes.encoders.encoder import Encode, Encoded, Encoder, Part
from pipeline.ground.codes.fp4 import Fp4
from pipeline.ground.codes.mx import GptOss
from pipeline.ground.codes.reading import reading
from pipeline.ground.codes.small_floats import E2M1, floats, pairs, scaled, unpaired
from pipeline.ground.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
_BEYOND = 7.0


@dataclass(frozen=True)
class MxEncoder(Encoder):
    """Codes packed along the columns; for gpt-oss along the rows of every expert, which stay together."""

    base: Fp4 | GptOss
    grows: bool = True

    @property
    def describe(self) -> str:
        return self.base.describe

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(e.name, e.dtype, e.shape) for e in self.base.entries)

    @property
    def grain(self) -> int:
        return self.shape[-2] if self._turned else 1

    @property
    def _turned(self) -> bool:
        return isinstance(self.base, GptOss)

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        scale = self.base.entries[1]
        with reading(device, scale) as (read,):

            def encode(rows: Tensor, start: int, stream: int | None) -> Encoded:
                assert stream is None
                values = self._along(rows.float())
                begin = start * self.shape[-1] // GROUP
                count = values.numel() // GROUP
                kept = floats(read(begin, begin + count), scale.dtype).view(-1, values.shape[1] // GROUP)
                return _encode(values, kept, scale.dtype, self.grows)

            yield encode

    def _along(self, rows: Tensor) -> Tensor:
        """The rows such that the values of a group lie side by side."""
        if not self._turned:
            return rows
        return rows.view(-1, *self.shape[-2:]).transpose(1, 2).flatten(0, 1)

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        import torch

        scale = self.base.entries[1].dtype
        table = pairs(E2M1, False, str(encoded.codes.device))
        scales = floats(encoded.sides[0].view(torch.uint8).flatten(), scale).view(encoded.sides[0].shape)
        values = scaled(unpaired(table, encoded.codes), scales, GROUP)
        if not self._turned:
            return values
        return values.view(-1, self.shape[-1], self.shape[-2]).transpose(1, 2).flatten(0, 1)

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        import torch

        part = self.parts[1]
        scales = torch.cat([side[0].view(torch.uint8).flatten() for side in sides])
        return {part.name: scales.view(torch_dtype(part.dtype)).view(part.shape)}


def _encode(values: Tensor, kept: Tensor, dtype: str, grows: bool) -> Encoded:
    """Bytes `(rows, columns / 2)` and scales `(rows, columns / 32)` in their dtype."""
    import torch

    groups = values.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2)
    needed = torch.exp2(torch.ceil(torch.log2(largest / _BEYOND)))
    scale = torch.where(largest > kept * _BEYOND, needed, kept) if grows else kept
    codes = nearest((groups / scale[:, :, None]).flatten(1))
    stored = (scale.view(torch.int32) >> 23).to(torch.uint8)  # of 2^-127, subnormal, too: 0
    return Encoded(codes[:, ::2] | codes[:, 1::2] << 4, (stored.view(torch_dtype(dtype)),))


def nearest(values: Tensor) -> Tensor:
    """The E2M1 code of every value, uint8: half to even, and the largest beyond it."""
    import torch

    size = values.abs()
    ranks = torch.where(
        size < 2,
        torch.round(size * 2),
        torch.where(size < 4, torch.round(size) + 2, torch.round(size / 2) + 4),
    )
    return ranks.clamp_(max=7).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
