"""Random matrices that VeRA and RandLoRA modules share, drawn from a seed as PEFT draws them.

Files saved with save_projection=false rely on torch's generator for the CPU giving the same numbers
everywhere. The matrices are as large as the largest module that the adapter changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from pipeline.ground.deltas.delta import Delta

if TYPE_CHECKING:
    from torch import Tensor


def largest(deltas: Sequence[Delta], kind: type[Delta]) -> tuple[int, int]:
    """The most outputs and the most inputs of any module, which need not be the same one."""
    shapes = [delta.shape for delta in deltas if isinstance(delta, kind)]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def vera(key: int, rank: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in float32: Kaiming's uniform init for a gain of sqrt(2)."""
    import torch

    generator = torch.Generator("cpu").manual_seed(key)
    A, B = (
        torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32), generator=generator)
        for shape in ((rank, size[1]), (size[0], rank))
    )
    return A, B


def randlora(key: int, rank: int, size: tuple[int, int], sparsity: str | None) -> tuple[Tensor, Tensor]:
    """A (r, 1, least) and B (most, n, r) of unit deviation: uniform in bfloat16, or sparse in float32.

    Sparse ones hold -1 and 1 with odds of 1 in 6 each, or of 1 in 2 sqrt(least) if very sparse. (PEFT
    draws float16 on accelerators without bfloat16, and its deviation is good to the last bit or so.)
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(key)
    most, least = max(size), min(size)
    n = -(-least // rank)
    if sparsity:
        odds = 1 / (2 * (sqrt(least) if sparsity == "very_sparse" else 3))
        draws = (torch.rand(shape, generator=generator) for shape in ((rank, 1, least), (most, n, rank)))
        A, B = ((draw > 1 - odds).float() - (draw < odds).float() for draw in draws)
    else:
        A, *parts = (
            torch.nn.init.kaiming_uniform_(
                torch.empty(shape, dtype=torch.bfloat16), a=sqrt(5), generator=generator
            )
            for shape in ((rank, 1, least), *[(most, 1, rank)] * n)
        )
        B = torch.cat(parts, dim=1)
    return A / A.std(), B / B.std()
