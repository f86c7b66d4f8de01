"""FP8 written: floats of eight bits over scales of blocks, rows, or whatever the base has.

Three ways to a scale: `transformers` (`Fp8Quantize`: values times 448 / amax, its reciprocal stored), where
the last blocks are cut instead of left out; `compressed-tensors` (`calculate_qparams`: values over amax /
448, rounded to the stored dtype first); and the base's own, kept, so that what no delta moves keeps its
very code. A kept scale of a block or row grows only where a value would lie beyond the largest code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground.codes.code import read_whole
from pipeline.ground.codes.encoders.encoder import Encode, Encoded, Encoder, Part
from pipeline.ground.codes.fp8 import Fp8, decode
from pipeline.ground.codes.reading import Bytes, matrices, num_bytes, reading
from pipeline.ground.codes.scale_grid import Grid
from pipeline.ground.codes.small_floats import E8M0, byte_values, floats
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.rounding import round_by_chance, ulp

if TYPE_CHECKING:
    from torch import Tensor


class Way(Enum):
    """How a scale is found."""

    transformers = "transformers"
    compressed_tensors = "compressed-tensors"
    kept = "kept"


@dataclass(frozen=True)
class Fp8Encoder(Encoder):
    """Codes of `dtype` with scales on a grid; `base` are the codes whose scales are kept, and may grow."""

    by_chance: ClassVar[bool] = True

    grid: Grid
    way: Way
    scale: Part
    dtype: str = "F8_E4M3"
    base: Fp8 | None = None
    grows: bool = True

    @property
    def describe(self) -> str:
        if self.base:
            return self.base.describe
        return f"FP8 E4M3, a scale per {'row' if self.grid.height == 1 else '128x128 block'}"

    @property
    def parts(self) -> tuple[Part, ...]:
        zero = self.base.zero_point if self.base else None
        more = (Part(zero.name, zero.dtype, zero.shape),) if zero else ()
        return (Part(self.name, self.dtype, self.shape), self.scale, *more)

    @property
    def grain(self) -> int:
        if self._shared or self.grid.height == 1:
            return 1
        alone = matrices(self.shape)[0] == 1 or self.grid.rows % self.grid.height == 0
        return min(self.grid.height, self.grid.rows) if alone else self.grid.rows

    @property
    def _shared(self) -> bool:
        """Whether a kept line of scales holds for a whole matrix, so that no tile can change it."""
        return self.way is Way.kept and self.grid.height >= self.grid.rows

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        with ExitStack() as stack:
            kept: Bytes | None = None
            if self.base:
                (kept,) = stack.enter_context(reading(device, self.base.scale))

            def encode(rows: Tensor, start: int, stream: int | None) -> Encoded:
                lines = self._kept(rows, start, kept) if kept else self._found(rows)
                inverse = self.way is Way.transformers
                values = _scaled(
                    rows.float(), self._by_row(lines, start, len(rows)), self.grid.width, inverse
                )
                lines = 1.0 / lines if inverse else lines
                values.clamp_(-self._limit, self._limit)
                if stream is None:
                    codes = values.to(torch_dtype(self.dtype))
                else:
                    codes = round_by_chance(values, self.dtype, stream, start * self.shape[-1])
                return Encoded(codes, (self._stored(lines),))

            yield encode

    @property
    def _limit(self) -> float:
        import torch

        return float(torch.finfo(torch_dtype(self.dtype)).max)

    def _found(self, rows: Tensor) -> Tensor:
        """What the values are multiplied by, or divided by: float32 `(lines of the grid, across)`."""
        import torch

        amax = self._amax(rows)
        if self.way is Way.transformers:
            return torch.where(amax > 0, self._limit / amax, 1.0)
        scale = amax / self._limit
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        return scale.to(torch_dtype(self.scale.dtype)).float()

    def _kept(self, rows: Tensor, start: int, read: Bytes) -> Tensor:
        import torch

        assert self.base
        grid, line = self.grid, self.grid.across * num_bytes(self.base.scale)
        first, end = grid.line(start), grid.line(start + len(rows) - 1) + 1
        scale = floats(read(first * line, end * line), self.base.scale.dtype).view(end - first, grid.across)
        if self.grows and not self._shared:
            over = self._amax(rows) / self._limit
            if self.base.scale.dtype in E8M0:
                over = torch.exp2(torch.ceil(torch.log2(over)))
            else:
                over = over.to(torch_dtype(self.base.scale.dtype)).float()
            edge = ulp(torch.tensor(self._limit), self.dtype).item() / 2  # beyond it nothing rounds back
            scale = torch.where(over > scale * (1 + edge / self._limit), over, scale)
        return torch.where(scale > 0, scale, 1.0)

    def _amax(self, rows: Tensor) -> Tensor:
        """Largest magnitudes of the blocks, `(lines, across)`."""
        import torch

        height, width, columns = self.grid.height, self.grid.width, rows.shape[1]
        each = self.grid.rows if self.grain == self.grid.rows else len(rows)
        apart = rows.float().abs().view(-1, each, columns)
        right, below = -columns % width, -each % height
        if right or below:
            apart = torch.nn.functional.pad(apart, (0, right, 0, below))
        blocks = apart.view(len(apart), -1, height, apart.shape[2] // width, width)
        return blocks.amax((2, 4)).flatten(0, 1)

    def _by_row(self, lines: Tensor, start: int, count: int) -> Tensor:
        """The line of every row."""
        import torch

        if len(lines) == 1 or self.grid.height == 1:
            return lines
        row, grid = torch.arange(start, start + count, device=lines.device), self.grid
        line = row // grid.rows * grid.down + row % grid.rows // grid.height
        return lines.index_select(0, line - line[0])

    def _stored(self, lines: Tensor) -> Tensor:
        import torch

        if self.scale.dtype not in E8M0:
            return lines.to(torch_dtype(self.scale.dtype))
        powers = (lines.view(torch.int32) >> 23).to(torch.uint8)
        return powers.view(torch_dtype(self.scale.dtype))

    def _scales(self, encoded: Encoded, start: int) -> Tensor:
        import torch

        stored = encoded.sides[0]
        lines = floats(stored.contiguous().view(-1).view(torch.uint8), self.scale.dtype).view(stored.shape)
        return self._by_row(lines, start, len(encoded.codes))

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        import torch

        values = byte_values(self.dtype, str(encoded.codes.device))
        return decode(encoded.codes.view(torch.uint8), self._scales(encoded, start), self.grid.width, values)

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        import torch

        if self.base and self._shared:
            found = {self.scale.name: read_whole(self.base.scale)}
        else:
            lines = [side[0].contiguous().view(torch.uint8) for side in sides]
            scales = torch.cat(lines).view(torch_dtype(self.scale.dtype))
            found = {self.scale.name: scales.view(self.scale.shape)}
        zero = self.base.zero_point if self.base else None
        return found | ({zero.name: read_whole(zero)} if zero else {})

    def step(self, values: Tensor, encoded: Encoded, start: int) -> Tensor:
        scales = self._scales(encoded, start).double()
        inner = _scaled(values.double(), scales, self.grid.width, False)
        units = ulp(inner.clamp_(-self._limit, self._limit), self.dtype)
        return _scaled(units, scales, self.grid.width, True)


def _scaled(values: Tensor, scales: Tensor, width: int, times: bool) -> Tensor:
    """Values `(rows, columns)`, every `width` of a row times or over a scale `(rows or 1, groups)`."""
    import torch

    made, whole = torch.empty_like(values), values.shape[1] // width
    operation = torch.mul if times else torch.div
    if whole:
        cut = values[:, : whole * width].unflatten(1, (whole, width))
        out = made[:, : whole * width].unflatten(1, (whole, width))
        operation(cut, scales[:, :whole, None], out=out)
    if values.shape[1] > whole * width:
        operation(values[:, whole * width :], scales[:, whole:], out=made[:, whole * width :])
    return made
