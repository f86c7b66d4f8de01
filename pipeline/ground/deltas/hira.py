"""HiRA: delta = W * (B @ A), elementwise (Huang et al. 2025, ICLR, openreview TwJrTz9cRS).

It depends on the base and is still added: several adapters add up on the unmerged base, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.deltas.patterns import pattern_value
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hira(Delta):
    """`A` (rank, in) or (rank, in, *k), `B` (out, rank); `transposed`: the weight holds (in, out)."""

    A: Entry
    B: Entry
    transposed: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def describe(self, factor: float) -> str:
        return f"HiRA rank {self.rank}" + (f" scale {factor:g}" if factor != 1 else "")

    def turned(self) -> Delta:
        return replace(self, transposed=not self.transposed, shape=self.shape[::-1])

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        A, B = (read_entry(entry, device, dtype).flatten(1) for entry in (self.A, self.B))
        left, right = (A.T.contiguous(), B.T.contiguous()) if self.transposed else (B, A)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (left[start:stop] @ right).mul_(W.to(torch_dtype(dtype))).mul_(factor)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    embedding = "hira_embedding_A" in trained.tensors or "hira_embedding_B" in trained.tensors
    names = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    A, B = (trained[name] for name in names)
    check_floats(trained, A, B)
    if len(trained.tensors) > 2:
        raise trained.refuse("has the factors of a layer and of an embedding")
    kernel = tuple(f"k{i}" for i in range(len(A.shape) - 2))
    sizes = check_shapes(
        trained, {names[0]: ("r", "in", *kernel), names[1]: ("out", "r", *(1 for _ in kernel))}
    )
    r = trained.config["r"]
    told = pattern_value(trained.module, trained.config.get("rank_pattern"), r)
    if sizes["r"] not in (told, r):  # PEFT 0.21 looks at rank_pattern only for a second adapter
        raise trained.refuse(f"has rank {sizes['r']}, but the config says {told}")
    shape = (sizes["out"], sizes["in"], *(sizes[k] for k in kernel))
    return [Hira(trained.module, "weight", shape[::-1] if embedding else shape, A, B, embedding)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    return wrong_values(config, counts=["r"], patterns={"rank_pattern": True})


KIND = Kind(
    peft_type="HIRA",
    tensors=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    fields=frozenset({"r", "hira_dropout", "init_weights"}),
    read=read,
    wrong=wrong,
)
