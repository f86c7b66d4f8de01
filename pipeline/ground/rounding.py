"""The one rounding of a merged value to the dtype it is stored in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.ground.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def round_to(value: Tensor, dtype: str) -> Tensor:
    """`value` in `dtype`, rounded once to nearest, ties to even; infinite where it overflows."""
    import torch

    kind = torch_dtype(dtype)
    if value.dtype == torch.float64 and kind in (torch.bfloat16, torch.float16):
        value = _to_odd_float32(value)  # torch goes through float32, which would round a second time
    return value.to(kind)


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
    exponent = torch.frexp(value.to(torch.float64).abs()).exponent - 1
    tiny = torch.frexp(torch.tensor(limits.smallest_normal, dtype=torch.float64)).exponent - 1
    exponent = torch.where(value == 0, tiny, torch.maximum(exponent, tiny))
    return torch.ldexp(torch.full_like(exponent, limits.eps, dtype=torch.float64), exponent)
