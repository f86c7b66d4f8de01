"""compressed-tensors' integers: packed codes of 1 to 8 bits, or plain int8, with scales and zero points.

pack-quantized: `weight_packed` I32 `(N, ceil(K bits / 32))`, along K a stream of bits (integers.py) of codes
plus 2^(bits - 1); `weight_shape` says K; `weight_zero_point` I32 the same along N, `(N bits / 32, groups)`.
int- and naive-quantized: `weight` I8 `(N, K)`, `weight_zero_point` I8 in the shape of the scales.
`weight_scale` is `(1)` for the tensor, `(N, 1)` for rows, `(N, groups)`, or one for each block of rows and
columns, the last ones cut. A dimension of experts may stand before all of them.

    W[n, k] = (q[n, k] - z[n, g]) * weight_scale[n, g]    rounded by the reference to the scales' dtype

Shapes say bits, groups and zero points; the config, whose groups may differ, must agree, and alone says
blocks. Source: compressed-tensors 0.20.0, `pack_quantized/helpers.py` and `lifecycle/forward_helpers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.compressed_schemes import Scheme, Schemes, fitting_grid
from pipeline.ground.codes.integers import scaled, unpacked
from pipeline.ground.codes.parts import Parts, by_module, named, numbers, sibling
from pipeline.ground.codes.reading import each, num_bytes, reading, refusal
from pipeline.ground.codes.scale_grid import Grid
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_OURS = {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias"}


@dataclass(frozen=True)
class Integers(Code):
    """The codes of a linear layer or an embedding, or of a stack of them."""

    bits: int
    grid: Grid
    codes: Entry
    scale: Entry
    zero: Entry | None
    said: Entry | None  # weight_shape

    @property
    def describe(self) -> str:
        kind, grid = "pack" if self.packed else "int", self.grid
        of = f"{grid.height}x{grid.width} block"
        if grid.height == 1:
            of = "row" if grid.across == 1 else f"group of {grid.width}"
        elif grid.height >= grid.rows and grid.across == 1:
            of = "tensor"
        return f"compressed-tensors {kind}-quantized {self.bits} bit, a scale per {of}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(e for e in (self.codes, self.scale, self.zero, self.said) if e)

    @property
    def packed(self) -> bool:
        return self.codes.dtype == "I32"

    @property
    def state_bytes(self) -> int:
        return prod(self.scale.shape) * (8 if self.zero else 4)

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        grid, columns = self.grid, self.shape[-1]
        scales = read_whole(self.scale, device).float().view(-1, grid.across)
        zeros = self.zeros(device)
        width = self.codes.shape[-1] * num_bytes(self.codes)
        with reading(device, self.codes) as (read,):

            def rows(start: int, stop: int) -> Tensor:
                raw = read(start * width, stop * width).view(stop - start, width)
                if self.packed:
                    values = unpacked(raw, self.bits, 2 ** (self.bits - 1))[:, :columns]
                else:
                    values = raw.view(torch.int8).float()
                row = torch.arange(start, stop, device=device)
                line = row // grid.rows * grid.down + row % grid.rows // grid.height
                zero = None if zeros is None else zeros.index_select(0, line)
                return scaled(values, scales.index_select(0, line), zero, grid.width)

            yield rows

    def zeros(self, device: str) -> Tensor | None:
        """Zero points `(lines of scales, groups)` float32."""
        import torch

        if self.zero is None:
            return None
        stored = read_whole(self.zero, device)
        if stored.dtype == torch.int8:
            return stored.float().view(-1, self.grid.across)
        turned = stored.view(-1, *self.zero.shape[-2:]).transpose(1, 2)  # (experts, groups, words)
        turned = turned.clone(memory_format=torch.contiguous_format)
        bytes_ = turned.flatten(0, 1).view(torch.uint8)
        zeros = unpacked(bytes_, self.bits, 2 ** (self.bits - 1))[:, : self.shape[-2]]
        return zeros.reshape(*turned.shape[:2], -1).transpose(1, 2).reshape(-1, self.grid.across)


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Modules with `weight_packed` I32, and `weight` I8 with a scale if the config is compressed-tensors."""
    schemes = Schemes.of(quantization.config)
    modules = {}
    for parts in by_module(tensors).values():
        packed, plain = parts.get("weight_packed"), parts.get("weight")
        if packed is not None and packed.dtype == "I32" and "scale_packed" not in parts:
            modules[packed.name] = parts
        elif plain is not None and plain.dtype == "I8" and "weight_scale" in parts and schemes.present:
            modules[plain.name] = parts

    def found(main: Entry) -> Found:
        return Found(sibling(main, "weight"), _code(main, modules[main.name], schemes), main)

    yield from each((tensors[name] for name in modules), found)


def _code(main: Entry, parts: Parts, schemes: Schemes) -> Integers:
    schemes.check()
    if "weight_g_idx" in parts:
        raise refusal(
            main, "is act-ordered (weight_g_idx), which compressed-tensors itself no longer decodes"
        )
    if strange := sorted(part for part in set(parts) - _OURS if part.startswith("weight")):
        raise refusal(
            main, f"stands beside '{strange[0]}', which no integer format of compressed-tensors has"
        )
    scale, zero, said = (parts.get(f"weight_{part}") for part in ("scale", "zero_point", "shape"))
    if scale is None or scale.dtype not in {"F32", "F16", "BF16"} or len(main.shape) < 2:
        raise refusal(main, f"has no weight_scale that fits: {named(parts)}")
    if main.dtype == "I32" and (
        said is None or said.dtype not in {"I64", "I32"} or said.shape not in {(2,), (3,)}
    ):
        raise refusal(main, "has no weight_shape, which says how many columns it holds")
    sizes = tuple(numbers(said)) if said and main.dtype == "I32" else main.shape[-2:]
    shape = (*main.shape[:-1], sizes[-1])
    module = main.name.rpartition(".")[0]
    if sizes[-len(shape) :] == shape[-len(sizes) :]:
        for scheme in schemes.schemes(module):
            bits = scheme.bits(shape[-1], main.shape[-1]) if main.dtype == "I32" else 8
            grid = fitting_grid(shape, scale.shape, scheme)
            if (
                bits
                and grid
                and _zero_fits(zero, scale, (*shape[:-2], -(-shape[-2] * bits // 32), grid.across), scheme)
            ):
                return Integers(shape, bits, grid, main, scale, zero, said)
    of = " or ".join(str(scheme) for scheme in schemes.schemes(module))
    raise refusal(main, f"does not fit together as {list(sizes)} codes of {of}: {named(parts)}")


def _zero_fits(zero: Entry | None, scale: Entry, packed: tuple[int, ...], scheme: Scheme) -> bool:
    if zero is None:
        return scheme.arguments.get("symmetric") is not False
    return (zero.dtype, zero.shape) in {("I8", scale.shape), ("I32", packed)}
