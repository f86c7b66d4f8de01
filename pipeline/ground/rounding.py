"""The one rounding of a merged value to the dtype it is stored in."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.selecting import key, words

if TYPE_CHECKING:
    from torch import Tensor

_COARSE = ("BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_EXPONENT = 0x7F800000  # its bits in a float32
_WIDE_EXPONENT = 0x7FF0000000000000  # in a float64
_NO_ADAPTER = -1  # whose draws these are, where several adapters have theirs


class Rounding(Enum):
    """How merged values become numbers of the stored dtype."""

    nearest = "nearest"
    stochastic = "stochastic"
    auto = "auto"


def round_to(value: Tensor, dtype: str) -> Tensor:
    """`value` in `dtype`, rounded once to nearest, ties to even; infinite where it overflows."""
    import torch

    kind = torch_dtype(dtype)
    if value.dtype == torch.float64 and kind in (torch.bfloat16, torch.float16):
        value = _to_odd_float32(value)  # torch goes through float32, which would round a second time
    return value.to(kind)


def takes_chance(dtype: str) -> bool:
    """Whether rounding to this dtype may be stochastic: it is coarser than float32."""
    return dtype in _COARSE


def stream_of(seed: int, weight: str) -> int:
    """The random bits by which a weight is rounded: 64 bits of the seed and its name."""
    return key(seed, _NO_ADAPTER, weight)


def round_by_chance(value: Tensor, dtype: str, stream: int, first: int) -> Tensor:
    """`value` in `dtype`: up or down with the probabilities that make its mean the value.

    The bits that decide on an element are those of the stream at its place in the weight, `first` being the
    first element's: they depend on nothing else. What nearest would bring to infinity is infinite.
    """
    import torch

    assert takes_chance(dtype)
    value = _to_odd_float32(value) if value.dtype == torch.float64 else value.float()
    flat = value.flatten()
    rounded = _bfloat16(flat, stream, first) if dtype == "BF16" else _other(flat, dtype, stream, first)
    return rounded.view(value.shape)


def _bfloat16(value: Tensor, stream: int, first: int) -> Tensor:
    """16 random bits are added to those that are cut off; the sum carries with their probability."""
    import torch

    bits = value.view(torch.int32)
    chance = _lanes(stream, first, len(value), 4, str(value.device)).view(torch.int16).int()
    drawn = (bits + chance.bitwise_and_(0xFFFF)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    plain = value.bfloat16()
    return torch.where(drawn.isfinite() & plain.isfinite(), drawn, plain)


def _other(value: Tensor, dtype: str, stream: int, first: int) -> Tensor:
    """|value| in units of its last place: whole part, and one more if a draw of 24 bits is below the rest."""
    import torch

    kind = torch_dtype(dtype)
    limits = torch.finfo(kind)
    power = value.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)  # 2^floor(log2 |value|)
    unit = power.clamp_(min=limits.smallest_normal).mul_(limits.eps)
    parts = value.abs().div_(unit)  # exact, for the unit is a power of two
    whole = parts.floor()
    drawn = _lanes(stream, first, len(value), 2, str(value.device)).view(torch.int32)
    chance = drawn.bitwise_right_shift(8).bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)
    away = whole.add_(chance < parts.sub_(whole)).mul_(unit).clamp_(max=limits.max).copysign_(value)
    beyond = ~(value.abs() <= limits.max)
    return torch.where(beyond, value.to(kind).float(), away).to(kind) if bool(beyond.any()) else away.to(kind)


def _lanes(stream: int, first: int, count: int, lanes: int, device: str) -> Tensor:
    """The bytes of `count` elements of 8 / lanes bytes each, out of words of 64 bits."""
    import torch

    begin, end = first // lanes, -(-(first + count) // lanes)
    width = 8 // lanes
    drawn = words(stream, begin, end, device).view(torch.uint8)
    return drawn[(first - begin * lanes) * width :][: count * width]


def _to_odd_float32(value: Tensor) -> Tensor:
    """float64 to float32, inexact results to the neighbour with an odd last bit.

    A later rounding to at most 22 bits then gives what rounding the float64 at once would have given
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    import torch

    near = value.to(torch.float32)
    error = value - near.to(torch.float64)
    even = near.view(torch.int32) & 1 == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(even & (error != 0), torch.nextafter(near, towards), near)


def ulp(value: Tensor, dtype: str) -> Tensor:
    """The distance between neighbours of `dtype` at these values, float64; the subnormal one near zero."""
    import torch

    limits = torch.finfo(torch_dtype(dtype))
    bits = value.to(torch.float64).view(torch.int64).bitwise_and(_WIDE_EXPONENT)
    return bits.view(torch.float64).clamp_(limits.smallest_normal, limits.max).mul_(limits.eps)
