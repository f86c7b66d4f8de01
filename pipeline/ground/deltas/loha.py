"""LoHa: delta = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r (Hyeon-Woo et al. 2021, arXiv:2108.06098).

With use_effective_conv2d a kernel's products are w(out, in, k, l) = sum t(i, j, k, l) w_a(i, out) w_b(j, in)
(Proposition 3); other kernels are matrices (out, in * k * l).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

_PAIRS = ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")
_CORES = "hada_t1", "hada_t2"


@dataclass(frozen=True)
class Loha(Delta):
    """Two products, each of (w_a (out, r), w_b (r, in)) or (w_a (r, out), w_b (r, in), t (r, r, k, l))."""

    products: tuple[tuple[Entry, ...], tuple[Entry, ...]]
    scale: float

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (*self.products[0], *self.products[1])

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + 2 * 8 * self._rank * self.num_columns

    @property
    def _rank(self) -> int:
        return self.products[0][1].shape[0]

    def describe(self, factor: float) -> str:
        return f"LoHa rank {self._rank} scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        first, second = (_rows_of(product, device, dtype) for product in self.products)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return first(start, stop) * second(start, stop) * (self.scale * factor)

        yield rows


def _rows_of(product: tuple[Entry, ...], device: str, dtype: str) -> Callable[[int, int], Tensor]:
    """Its rows (stop - start, in * k * l); a kernel's are summed over w_b's rank first, as PEFT does."""
    import torch

    w_a, w_b, *core = (read_entry(entry, device, dtype) for entry in product)
    if not core:
        return lambda start, stop: w_a[start:stop] @ w_b
    right = torch.einsum("ijkl,jr->rkli", core[0], w_b).reshape(-1, w_a.shape[0])
    return lambda start, stop: (right @ w_a[:, start:stop]).T


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    cores = _CORES if any(map(trained.get, _CORES)) else ()
    suffixes = (*_PAIRS[0], *_PAIRS[1], *cores)
    check_floats(trained, *(trained[suffix] for suffix in suffixes))
    sides = (("r", "out") if cores else ("out", "r")), ("r", "in")
    wanted = dict(zip(suffixes, (*sides * 2, *[("r", "r", "k", "l")] * len(cores)), strict=True))
    sizes = check_shapes(trained, wanted)
    rank = pattern_value(trained.module, trained.config.get("rank_pattern"), trained.config["r"])
    if sizes["r"] != rank:
        raise trained.refuse(f"has rank {sizes['r']}, but the config says {rank}")
    alpha = pattern_value(trained.module, trained.config.get("alpha_pattern"), trained.config["alpha"])
    first, second = (tuple(trained[s] for s in (*pair, *cores[n : n + 1])) for n, pair in enumerate(_PAIRS))
    shape = (sizes["out"], sizes["in"] * sizes.get("k", 1) * sizes.get("l", 1))
    return [Loha(trained.module, "weight", shape, (first, second), alpha / rank)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    patterns = {"rank_pattern": True, "alpha_pattern": False}
    return wrong_values(config, counts=["r"], numbers=["alpha"], patterns=patterns)


KIND = Kind(
    peft_type="LOHA",
    tensors=(*_PAIRS[0], *_PAIRS[1], *_CORES),
    fields=frozenset(
        {"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
    ),
    read=read,
    wrong=_wrong,
)
