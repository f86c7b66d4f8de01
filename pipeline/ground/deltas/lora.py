"""LoRA on a linear layer: delta = scale * B @ A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.deltas.delta import Delta, RowsOf
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.files import read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lora(Delta):
    """`A` is lora_A (rank, in_features), `B` is lora_B (out_features, rank), with their file's values."""

    A: Entry
    B: Entry
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def describe(self, factor: float) -> str:
        return f"LoRA rank {self.rank} scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float) -> Iterator[RowsOf]:
        A, B = (_read(entry).to(device).to(torch_dtype(dtype)) for entry in (self.A, self.B))
        scale = self.scale * factor

        def rows(start: int, stop: int) -> Tensor:
            return (B[start:stop] @ A).mul_(scale)  # the scale after the product, as PEFT has it

        yield rows


def _read(entry: Entry) -> Tensor:
    with entry.extent.file.opened() as descriptor:
        raw = read_tensor(descriptor, entry.extent.offset, entry.extent.length)
    return raw.view(torch_dtype(entry.dtype)).view(entry.shape)
