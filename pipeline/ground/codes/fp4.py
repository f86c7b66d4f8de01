"""FP4 (E2M1) codes packed along the columns, with a scale for every group of them: NVFP4 and MXFP4.

`(..., N, K / 2)` bytes, low nibble first; scales `(..., N, K / group)`, E4M3 (NVFP4, with a scale of the
whole tensor besides) or E8M0 (MXFP4). W = level * scale; the scale is a product or quotient with the
tensor's, rounded in float32 before it is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Rows, read_whole
from pipeline.ground.codes.reading import matrices, reading
from pipeline.ground.codes.small_floats import E2M1, floats, pairs, scaled, stacked, unpaired
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fp4(Code):
    """Floats of four bits. `stacked`: packed along the rows instead, with scales `(..., N / group, K)`."""

    kind: str
    group: int
    packed: Entry
    scale: Entry
    of_tensor: Entry | None = None  # one number, or one for every matrix
    divides: bool = False  # it is the reciprocal
    stacked: bool = False

    @property
    def describe(self) -> str:
        return self.kind

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.packed, self.scale, *([self.of_tensor] if self.of_tensor else []))

    @property
    def grain(self) -> int:
        return self.group if self.stacked else 1

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        _, height, columns = matrices(self.shape)
        down, across = (self.group, 1) if self.stacked else (1, self.group)
        width = columns // across  # scales of a line, which holds for `down` rows
        whole = read_whole(self.of_tensor, device).flatten() if self.of_tensor else None
        table = pairs(E2M1, False, device)
        with reading(device, self.packed, self.scale) as (codes, scales):

            def rows(start: int, stop: int) -> Tensor:
                first, last = start // down, -(-stop // down)
                end = last * down
                raw = codes(start * columns // 2, end * columns // 2)
                scale = floats(scales(first * width, last * width), self.scale.dtype).view(-1, width)
                if whole is not None:
                    line = torch.arange(first, last, device=device) * down // height
                    of_tensor = whole.index_select(0, line)[:, None] if len(whole) > 1 else whole
                    # by a tensor on the device, for torch divides by a number as it multiplies by 1 / number
                    scale = scale.div_(of_tensor) if self.divides else scale.mul_(of_tensor)
                if self.stacked:
                    return stacked(raw.view(-1, columns), scale, self.group)[: stop - start]
                return decode(raw.view(stop - start, columns // 2), scale, self.group, table)

            yield rows


def decode(packed: Tensor, scales: Tensor, group: int, table: Tensor) -> Tensor:
    """Bytes `(rows, K / 2)` and scales `(rows, K / group)` float32 to `(rows, K)` float32."""
    return scaled(unpaired(table, packed), scales, group)
