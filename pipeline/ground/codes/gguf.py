"""GGUF's tensor types decoded as `gguf.quants.dequantize` decodes them, bit for bit, on any device.

A row is a run of blocks, a block a few bytes of scales and codes. Every decoder below takes blocks
`(n, bytes per block)` uint8 and returns `(n, elements per block)` float32, computed in float32 in the
order of the reference, for the bits depend on it. Layouts: `ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline.ground.errors import Refused
from pipeline.ground.gguf import TYPES

if TYPE_CHECKING:
    from torch import Tensor

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def row_bytes(code: str, columns: int) -> int:
    """Bytes of a row of `columns` elements; Refused for a type without decoder or a broken block."""
    if code not in BLOCKS:
        raise Refused(f"GGUF type {code} cannot be decoded; {', '.join(BLOCKS)} can")
    elements, size = BLOCKS[code]
    if columns % elements:
        raise Refused(f"a row of {columns} elements does not fill {code} blocks of {elements}")
    return columns // elements * size


def decode(code: str, raw: Tensor) -> Tensor:
    """Rows of blocks `(rows, row_bytes)` uint8 to `(rows, columns)` float32, in memory of its own."""
    elements, size = BLOCKS[code]
    num_rows, num_bytes = raw.shape
    assert num_bytes % size == 0, f"{num_bytes} bytes are no row of {code}"
    shape = num_rows, num_bytes // size * elements
    blocks = raw.reshape(num_rows * num_bytes // size, size)
    if blocks.storage_offset() % 8:
        blocks = blocks.clone()  # a view as a wider dtype must start at a multiple of its width
    return _DECODERS[code](blocks).view(shape)


def _f32(blocks: Tensor) -> Tensor:
    import torch

    return blocks.view(torch.float32).clone()


def _f16(blocks: Tensor) -> Tensor:
    import torch

    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    import torch

    return blocks.view(torch.bfloat16).float()


def _f64(blocks: Tensor) -> Tensor:
    import torch

    return blocks.view(torch.float64).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _fields(blocks[:, 2:], 4, 16).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _fields(blocks[:, 4:], 4, 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6])
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8])
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = _half(blocks, 80) * (scales & 15).float()
    minimum = _half(blocks, 82) * (scales >> 4).float()
    return _scaled(_fields(blocks[:, 16:80], 2, 32), scale, minimum)


def _q3_k(blocks: Tensor) -> Tensor:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scale = _half(blocks, 108) * (low | high << 4).float().sub_(32)
    codes = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    return _scaled(codes, scale, offset=4)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(_fields(blocks[:, 16:], 4, 32), *_scale_and_minimum(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return _scaled(codes, *_scale_and_minimum(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    import torch

    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    codes = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    return _scaled(codes, scale, offset=32)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(_IQ4_LEVELS, _fields(blocks[:, 2:], 4, 16)).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    import torch

    # scales of six bits: two low nibbles to a byte, the high pairs one after the other in 16 bits
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    high = torch.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)
    scale = _half(blocks, 0) * (low | high << 4).float().sub_(32)
    levels = _looked_up(_IQ4_LEVELS, _fields(blocks[:, 8:], 4, 16))
    return levels.view(-1, 8, 32).mul_(scale[..., None]).flatten(1)


def _tq1_0(blocks: Tensor) -> Tensor:
    import torch

    def trits(packed: Tensor, count: int) -> Tensor:
        """The first `count` digits of fractions in base 3, a byte each: the next, times 3, overflows."""
        turned = torch.stack([packed * 3**digit for digit in range(count)], 1)
        return (turned.short() * 3 >> 8).flatten(1)

    codes = torch.cat([trits(blocks[:, :32], 5), trits(blocks[:, 32:48], 5), trits(blocks[:, 48:52], 4)], 1)
    return codes.float().sub_(1).mul_(_half(blocks, 52))


def _tq2_0(blocks: Tensor) -> Tensor:
    return _fields(blocks[:, :64], 2, 32).float().sub_(1).mul_(_half(blocks, 64))


def _mxfp4(blocks: Tensor) -> Tensor:
    import torch

    # half of the power of two 2^(e - 127), for the levels are doubled; below e = 2 it is subnormal
    exponent = blocks[:, :1].int()
    half_scale = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23).view(torch.float32)
    return _looked_up(_E2M1_DOUBLED, _fields(blocks[:, 1:], 4, 16)).mul_(half_scale)


def _nvfp4(blocks: Tensor) -> Tensor:
    # half of an unsigned E4M3, for the levels are doubled; 0x7F (NaN) counts as zero, bit 7 is ignored
    fields = [(byte >> 3 & 15, byte & 7) for byte in range(256)]
    half_scales = [(8 * (e > 0) + m) * 2.0 ** (max(e, 1) - 11) for e, m in fields]
    half_scales[0x7F] = 0.0
    scale = _looked_up(half_scales, blocks[:, :4])
    levels = _looked_up(_E2M1_DOUBLED, _fields(blocks[:, 4:], 4, 8))
    return levels.view(-1, 4, 16).mul_(scale[..., None]).flatten(1)


def _by_reference(code: str, blocks: Tensor) -> Tensor:
    """The rare types with large grids, decoded by the gguf package on the CPU."""
    import numpy
    import torch
    from gguf import GGMLQuantizationType, quants

    if len(blocks) == 0:
        return torch.empty(0, device=blocks.device)
    with numpy.errstate(all="ignore"):
        values = quants.dequantize(blocks.cpu().numpy().reshape(1, -1), GGMLQuantizationType[code])
    return torch.from_numpy(values).to(blocks.device)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of every block, `(n, 1)` float32."""
    import torch

    return blocks[:, at : at + 2].view(torch.float16).float()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """The fields of `bits` bits of bytes `(n, k)`, `(n, k * 8 / bits)` uint8.

    Of every `run` bytes come first the lowest fields, then the next higher ones, as ggml lays them out.
    """
    import torch

    word, width = (torch.int64, 8) if run % 8 == 0 else (torch.int32, 4)
    mask = int.from_bytes(bytes([2**bits - 1]) * width, "little")
    aligned = packed.clone(memory_format=torch.contiguous_format)
    words = aligned.view(word).view(-1, run // width)  # eight bytes in one go
    planes = [words >> shift & mask for shift in range(0, 8, bits)]
    if run == 16 and packed.device.type == "cpu":  # one move of 16 bytes is three times as fast as two of 8
        planes = [plane.view(torch.complex128) for plane in planes]
    return torch.stack(planes, 1).view(torch.uint8).view(len(packed), packed.shape[1] * 8 // bits)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The bits of bytes `(n, k)`, lowest first, each as the value 16: `(n, 8 k)` uint8."""
    import torch

    # a byte is copied into all bytes of a word, the i-th bit kept of the i-th copy, carried to bit 7, moved
    copies = packed.long() * 0x0101010101010101 & 0x8040201008040201 - (1 << 64)
    return (copies + 0x00406070787C7E7F >> 3 & 0x1010101010101010).view(torch.uint8)


def _looked_up(table: Sequence[float], codes: Tensor) -> Tensor:
    """`table[codes]`, float32, of the shape of the codes."""
    import torch

    levels = torch.tensor(table, dtype=torch.float32, device=codes.device)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _scale_and_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: eight scales and minima `(n, 8)` of six bits each, packed in twelve bytes."""
    import torch

    one, two, three = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([one & 63, three & 15 | one >> 2 & 48], 1)
    minima = torch.cat([two & 63, three >> 4 | two >> 2 & 48], 1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _scaled(codes: Tensor, scale: Tensor, minimum: Tensor | None = None, offset: int = 0) -> Tensor:
    """`scale * (codes - offset) - minimum`, where a scale `(n, k)` holds for the k-th part of a block."""
    values = codes.view(*scale.shape, codes.shape[1] // scale.shape[1]).float()
    if offset:
        values.sub_(offset)
    values.mul_(scale[..., None])
    if minimum is not None:
        values.sub_(minimum[..., None])
    return values.flatten(1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "F64": _f64,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
} | {
    code: partial(_by_reference, code)
    for code in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
}

# type: (elements per block, bytes per block), for every type that can be decoded
BLOCKS = {code: (elements, size) for code, elements, size in TYPES.values() if code in _DECODERS}
