"""DeLoRA: delta = B diag(lambda / r / (|A_i| |B_i|)) A * |w| (arXiv:2503.18225).

A_i are the rows of A, B_i the columns of B, |w| the norms of the base weight's columns as they were when
training began; the file holds them. Bini et al., "DeLoRA: Decoupling Angles and Strength in Low-rank
Adaptation", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.deltas.patterns import pattern_value
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_NORM = 1e-4  # PEFT's, so that an untrained B of zeros divides


@dataclass(frozen=True)
class Delora(Delta):
    """`A` (rank, in), `B` (out, rank), `strength` (1,), which is lambda, and `norms` (in,)."""

    A: Entry
    B: Entry
    strength: Entry
    norms: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B, self.strength, self.norms)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def state_bytes(self) -> int:
        return 2 * super().state_bytes

    def describe(self, factor: float) -> str:
        return f"DeLoRA rank {self.rank}" + (f" scale {factor:g}" if factor != 1 else "")

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        A, B, strength, norms = (read_entry(entry, device, dtype) for entry in self.entries)
        lengths = A.norm(dim=1).clamp(min=_LEAST_NORM) * B.norm(dim=0).clamp(min=_LEAST_NORM)
        left = B * (strength / self.rank / lengths)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (left[start:stop] @ A).mul_(norms).mul_(factor)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "delora_A": ("r", "in"),
        "delora_B": ("out", "r"),
        "delora_lambda": (1,),
        "delora_w_norm": ("in",),
    }
    entries = [trained[suffix] for suffix in shapes]
    check_floats(trained, *entries)
    sizes = check_shapes(trained, shapes)
    told = pattern_value(trained.module, trained.config.get("rank_pattern"), trained.config["r"])
    if sizes["r"] != told:
        raise trained.refuse(f"has rank {sizes['r']}, but the config says {told}")
    return [Delora(trained.module, "weight", (sizes["out"], sizes["in"]), *entries)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    return wrong_values(config, counts=["r"], patterns={"rank_pattern": True})


KIND = Kind(
    peft_type="DELORA",
    tensors=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    fields=frozenset({"r", "delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}),
    read=read,
    wrong=wrong,
)
