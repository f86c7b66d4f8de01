"""Codes packed as the formats are described, in numpy: written apart from the decoders, to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes `(rows, n)` as a stream of bits, the lowest first, filled up to int32 words `(rows, words)`."""
    each = codes.numpy().astype(np.int64)[:, :, None] >> np.arange(bits) & 1
    flat = each.reshape(len(codes), -1).astype(np.uint8)
    full = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(full, axis=1, bitorder="little").view(np.int32).copy())


def planes(codes: Tensor, bits: int) -> Tensor:
    """Codes `(rows, n)` as gptqmodel's planar layout: of every 32 codes one stream per plane of bits."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,))
    turns, parts, low = codes.view(-1, 32), [], 0
    for width in widths:
        parts.append(stream(turns >> low & 2**width - 1, width))
        low += width
    return torch.cat(parts, 1).reshape(len(codes), -1)


def interleaved(codes: Tensor) -> Tensor:
    """Codes `(inputs, outputs)` as AWQ gemm packs them: of eight outputs 0, 2, 4, 6, then 1, 3, 5, 7."""
    return stream(codes.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)


def random_codes(*shape: int, bits: int, seed: int = 0, low: int = 0) -> Tensor:
    """Codes of every value from `low` on, int64."""
    return torch.randint(low, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, seed: int = 1) -> Tensor:
    """Scales of either sign and of many sizes, some of them subnormal in float16; float16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-20, 3, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), sizes).half()


def quantized(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zero points) of a weight `(rows, columns)`, rounded to nearest in groups of columns."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).long(), scales, zeros.long()
