"""Integer codes: taken out of a stream of bits, less their zero points, times their scales, in float32.

GPTQ, AWQ gemv and compressed-tensors pack codes of b bits densely: the i-th of a row lies at bits i b,
i b + 1, ... of its bytes, the lowest first, also across bytes and words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def unpacked(packed: Tensor, bits: int, less: int = 0) -> Tensor:
    """The codes of rows of bytes `(rows, bytes)` uint8, `less` subtracted: `(rows, bytes * 8 // bits)`."""
    import torch

    num_rows, num_bytes = packed.shape
    if bits == 8:
        return packed.float().sub_(less) if less else packed.float()
    if bits in (1, 2, 4):
        # one look-up gives all the codes of a byte; a single wide number is moved faster than its parts
        table = _table(bits, less, str(packed.device))
        values = table.index_select(0, packed.flatten().int())
        return values.view(torch.float32).view(num_rows, num_bytes * 8 // bits)
    fill = -num_bytes % bits
    padded = torch.nn.functional.pad(packed, (0, fill)) if fill else packed
    turns = padded.view(padded.numel() // bits, bits)  # eight codes in `bits` bytes
    kind = torch.int32 if bits == 3 else torch.int64
    word = turns[:, 0].to(kind)
    for place in range(1, bits):
        word |= turns[:, place].to(kind) << 8 * place
    codes = torch.stack([(word >> bits * i & 2**bits - 1).byte() for i in range(8)], 1)
    values = codes.float().sub_(less) if less else codes.float()
    return values.view(num_rows, padded.shape[1] * 8 // bits)[:, : num_bytes * 8 // bits]


@lru_cache(maxsize=64)
def _table(bits: int, less: int, device: str) -> Tensor:
    """The codes of every byte: 256 numbers as wide as the float32 values of a byte."""
    import torch

    byte = torch.arange(256)[:, None]
    codes = byte >> torch.arange(0, 8, bits) & 2**bits - 1
    values = (codes - less).to(device, torch.float32)
    return values if bits == 1 else values.view({2: torch.complex128, 4: torch.float64}[bits]).flatten()


def scaled(values: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """`(values - zero) * scale`, in place; values `(rows, columns)`, the others `(rows, groups)`.

    A group is `group` columns, the last one may be short. All float32; codes less zero points are exact.
    """
    columns = values.shape[1]
    full = columns // group
    parts = [(values[:, : full * group].unflatten(1, (full, group)), slice(0, full))] if full else []
    if columns % group:
        parts.append((values[:, None, full * group :], slice(full, full + 1)))
    for part, groups in parts:
        if zero is not None:
            part.sub_(zero[:, groups, None])
        part.mul_(scale[:, groups, None])
    return values
