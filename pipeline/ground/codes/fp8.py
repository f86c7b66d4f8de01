"""FP8 weights with scales: one of the whole, of every row or column, or of every block, the last ones cut.

`weight` F8_E4M3 or F8_E5M2 (..., N, K), also FNUZ; scales F32, BF16, F16 or E8M0 (powers of two, as F8_E8M0
or plain U8), beside it as `weight_scale_inv` (DeepSeek, transformers), `weight_scale` (compressed-tensors,
fbgemm, modelopt, Quark), `scale` (DeepSeek-V4) or `qscale_weight` (Mistral); for fused experts `X_scale_inv`,
`X_scale` or `X_weight_scale` beside `X`. W[n, k] = f32(weight[n, k]) * f32(scale[n // height, k // width]):
compressed-tensors' `FP8BlockDequantizer`, transformers' `Fp8Dequantize`. MXFP8 is the block of 1 x 32.

Blocks are those of the config, counted from the first row: transformers takes them from the shape of the
scales, which is wrong where they do not divide the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Found, Quantization, Rows
from pipeline.ground.codes.reading import each, num_bytes, read_small, reading, refusal, told
from pipeline.ground.codes.scale_grid import Grid, fitted, told_blocks
from pipeline.ground.codes.small_floats import E8M0, SCALES, byte_values, floats, looked_up, scaled
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_METHODS = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors")  # whose FP8 weights always have scales


@dataclass(frozen=True)
class Fp8(Code):
    """Floats of eight bits, and the scales of their blocks."""

    weight: Entry
    scale: Entry
    grid: Grid
    zero_point: Entry | None = None  # nothing but zeros

    @property
    def describe(self) -> str:
        if self.grid.height == 1 and self.grid.width == 32 and self.scale.dtype in E8M0:
            return "MXFP8"
        whole, columns = self.grid.height >= self.grid.rows, self.grid.width >= self.shape[-1]
        if columns:
            of = "tensor" if whole else "row" if self.grid.height == 1 else f"{self.grid.height} rows"
        else:
            of = "column" if whole and self.grid.width == 1 else f"{self.grid.height}x{self.grid.width} block"
        return f"FP8 {self.weight.dtype.removeprefix('F8_')}, a scale per {of}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.weight, self.scale, *([self.zero_point] if self.zero_point else []))

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        grid, columns = self.grid, self.shape[-1]
        line_bytes, values = grid.across * num_bytes(self.scale), byte_values(self.weight.dtype, device)
        with reading(device, self.weight, self.scale) as (codes, lines):

            def rows(start: int, stop: int) -> Tensor:
                raw = codes(start * columns, stop * columns).view(stop - start, columns)
                first = grid.line(start)
                end = grid.line(stop - 1) + 1 if stop > start else first
                scales = floats(lines(first * line_bytes, end * line_bytes), self.scale.dtype)
                scales = scales.view(end - first, grid.across)
                if grid.height > 1 and end - first > 1:
                    row = torch.arange(start, stop, device=device)
                    line = row // grid.rows * grid.down + row % grid.rows // grid.height
                    scales = scales.index_select(0, line - first)
                return decode(raw, scales, grid.width, values)

            yield rows


def decode(codes: Tensor, scales: Tensor, width: int, values: Tensor) -> Tensor:
    """Codes `(rows, columns)` uint8, scales `(rows or 1, groups)` of `width` columns, to float32."""
    return scaled(looked_up(values, codes), scales, width)


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every FP8 tensor of two dimensions or more that has scales beside it."""
    blocks = told_blocks(quantization.config)

    def found(weight: Entry) -> Found | None:
        scales = [tensors[name] for name in scale_names(weight.name) if name in tensors]
        if not scales:
            method = quantization.config.get("quant_method")
            if method in _METHODS and weight.name.endswith(".weight"):
                raise refusal(weight, f"is FP8 under quant_method {method}, but no scale stands beside it")
            return None
        if len(scales) > 1 or scales[0].dtype not in SCALES:
            has = " and ".join(f"'{scale.name}' ({scale.dtype})" for scale in scales)
            raise refusal(weight, f"is FP8 and has {has} beside it, not one scale of {', '.join(SCALES)}")
        by_column = quantization.config.get("quant_method") == "fbgemm_fp8" and len(weight.shape) > 2
        tried = (*blocks, (1, 32)) if scales[0].dtype in E8M0 else blocks
        grid = fitted(weight.shape, scales[0].shape, tried, by_column)
        if grid is None:
            of = " or ".join(f"{height}x{width}" for height, width in tried)
            shapes = f"{list(scales[0].shape)}, which fits neither the whole {list(weight.shape)}"
            raise refusal(scales[0], f"is {shapes}, nor its rows, nor blocks of {of}")
        zero = tensors.get(weight.name + "_zero_point")
        if zero and any(read_small(zero)):
            raise refusal(zero, f"is {told(zero)} and not zero: FP8 codes with an offset cannot be read")
        return Found(weight.name, Fp8(weight.shape, weight, scales[0], grid, zero), weight)

    weights = (e for e in tensors.values() if e.dtype in _WEIGHTS and len(e.shape) > 1)
    yield from each(weights, found)


def scale_names(name: str) -> tuple[str, ...]:
    """What the scales of a weight may be called."""
    module = name.removesuffix("weight")
    others = (name + "_weight_scale",) if module == name else (module + "scale", module + "qscale_weight")
    return (name + "_scale_inv", name + "_scale", *others)
