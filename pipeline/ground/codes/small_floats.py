"""Floats of a byte or less as tables of their values: a look-up is several times as fast as torch's cast.

E2M1 (FP4): sign, two bits of exponent, one of mantissa. E4M3 and E5M2 (FP8): as torch casts them, NaN and
infinity included. E8M0 (scales of the MX formats): 2^(byte - 127), where byte 255 is NaN as a float8_e8m0fnu
but infinity as a plain uint8, for so its readers compute it (exp2). OCP "Microscaling Formats (MX) 1.0".
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.ground.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0 = ("F8_E8M0", "U8")  # how files call it
SCALES = ("F32", "F16", "BF16", *E8M0)  # dtypes in which scales of FP8 and FP4 come


@lru_cache(maxsize=64)
def byte_values(dtype: str, device: str) -> Tensor:
    """The value of every byte, `(256,)` float32; U8 is E8M0."""
    import torch

    if dtype in E8M0:
        bits = torch.arange(256, dtype=torch.int32) << 23
        bits[0] = 1 << 22  # 2^-127 has no exponent of its own in float32: it is subnormal
        bits[255] = 0x7F800000 if dtype == "U8" else 0x7FC00000
        return bits.view(torch.float32).to(device)
    return torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).float().to(device)


@lru_cache(maxsize=64)
def pairs(levels: tuple[float, ...], high_first: bool, device: str) -> Tensor:
    """The two values of every byte of two codes, `(256,)`, each pair the bits of an int64."""
    import torch

    codes = torch.arange(256)
    nibbles = torch.stack([codes >> 4, codes & 15] if high_first else [codes & 15, codes >> 4], 1)
    values = torch.tensor(levels, dtype=torch.float32)[nibbles]
    return values.view(torch.int64).flatten().to(device)


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """`table[codes]` of the shape of the codes (uint8)."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def unpaired(table: Tensor, packed: Tensor) -> Tensor:
    """Packed bytes `(..., n)` to values `(..., 2n)` float32, by a table of pairs."""
    import torch

    return looked_up(table, packed).view(torch.float32)


def floats(raw: Tensor, dtype: str) -> Tensor:
    """Bytes as the dtype says, `(n,)` float32; exact."""
    if dtype in ("F32", "F16", "BF16"):
        return raw.view(torch_dtype(dtype)).float()
    return looked_up(byte_values(dtype, str(raw.device)), raw)


def scaled(values: Tensor, scales: Tensor, width: int) -> Tensor:
    """Values `(rows, columns)`, every `width` of them in a row times a scale `(rows or 1, groups)`; in place.

    The last group may be short.
    """
    whole = values.shape[1] // width
    if whole:
        groups = values[:, : whole * width].unflatten(1, (whole, width))
        groups.mul_(scales[:, :whole, None])
    if values.shape[1] > whole * width:
        values[:, whole * width :].mul_(scales[:, whole:])
    return values


def stacked(packed: Tensor, scales: Tensor, group: int, levels: tuple[float, ...] = E2M1) -> Tensor:
    """FP4 packed along the rows: bytes `(n, columns)` to `(2n, columns)` float32.

    Byte i of a column holds its rows 2i (low nibble) and 2i + 1; every `group` rows have scales
    `(2n / group, columns)`.
    """
    import torch

    table = torch.tensor(levels, dtype=torch.float32, device=packed.device)
    values = looked_up(table, torch.stack([packed & 15, packed >> 4], 1))
    values = values.view(len(scales), group, packed.shape[1]).mul_(scales[:, None])
    return values.view(2 * len(packed), packed.shape[1])
