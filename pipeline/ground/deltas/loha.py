"""LoHa: delta = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loha(Delta):
    """Factors as in the file: `w_a` (out, rank), `w_b` (rank, in), one pair for each of the two products."""

    factors: tuple[Entry, Entry, Entry, Entry]
    scale: float

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.factors

    def describe(self, factor: float) -> str:
        return f"LoHa rank {self.factors[0].shape[1]} scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        w1_a, w1_b, w2_a, w2_b = (read_entry(entry, device, dtype) for entry in self.factors)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (w1_a[start:stop] @ w1_b) * (w2_a[start:stop] @ w2_b) * (self.scale * factor)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    if trained.get("hada_t1"):
        raise trained.refuse("has hada_t1")
    suffixes = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    w1_a, w1_b, w2_a, w2_b = factors = tuple(trained[suffix] for suffix in suffixes)
    check_floats(trained, *factors)
    pair = ("out", "r"), ("r", "in")
    sizes = check_shapes(trained, dict(zip(suffixes, pair * 2, strict=True)))
    scale = trained.config["alpha"] / sizes["r"]
    return [Loha(trained.module, "weight", (sizes["out"], sizes["in"]), (w1_a, w1_b, w2_a, w2_b), scale)]


KIND = Kind(
    peft_type="LOHA",
    tensors=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    fields=frozenset(
        {"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    ),
    read=read,
)
