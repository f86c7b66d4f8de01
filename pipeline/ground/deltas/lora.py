"""LoRA: delta = scale * B @ A (Hu et al. 2021, arXiv:2106.09685), on linear, kernel and embedding weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lora(Delta):
    """`A` is lora_A (rank, in_features) or (rank, in, *k), `B` lora_B (out_features, rank), as in the file.

    `transposed`: the weight holds (in, out), as Conv1D and embeddings do. `blocks`: A and B are that many
    blocks of a block-diagonal matrix (BD-LoRA).
    """

    A: Entry
    B: Entry
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA
    transposed: bool = False
    blocks: tuple[int, int] = (1, 1)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def describe(self, factor: float) -> str:
        return f"LoRA rank {self.rank} scale {self.scale * factor:g}"

    def turned(self) -> Lora:
        return replace(self, transposed=not self.transposed, shape=self.shape[::-1])

    def factors(self, device: str, dtype: str) -> tuple[Tensor, Tensor]:
        """(left, right) whose product, times the scale, is the delta: B and A, or A.T and B.T."""
        A = _block_diagonal(read_entry(self.A, device, dtype).flatten(1), self.blocks[0])
        B = _block_diagonal(read_entry(self.B, device, dtype).flatten(1), self.blocks[1])
        return (A.T.contiguous(), B.T.contiguous()) if self.transposed else (B, A)

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        left, right = self.factors(device, dtype)
        scale = self.scale * factor

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (left[start:stop] @ right).mul_(scale)  # the scale after the product, as PEFT has it

        yield rows


def _block_diagonal(factor: Tensor, blocks: int) -> Tensor:
    import torch

    return torch.block_diag(*factor.chunk(blocks, 0)) if blocks > 1 else factor
