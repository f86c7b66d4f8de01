"""LoKr: delta = kron(w1, w2) * alpha / r, either of them whole or a product of two factors of rank r
(Edalati et al. 2022, arXiv:2212.10650; LyCORIS, arXiv:2309.14859).

w2 of a kernel is (b, d, k, l), (b, d * k * l) as a product, or w2(b, d, k, l) =
sum t2(i, j, k, l) w2_a(i, b) w2_b(j, d) with use_effective_conv2d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.deltas.patterns import pattern_value
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = {2: ("b", "d"), 3: ("b", "d", "k"), 4: ("b", "d", "k", "l")}


@dataclass(frozen=True)
class Lokr(Delta):
    """`w1` is (w1,) or (w1_a, w1_b); `w2` is (w2,), (w2_a, w2_b) or (w2_a, w2_b, t2)."""

    w1: tuple[Entry, ...]
    w2: tuple[Entry, ...]
    scale: float

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (*self.w1, *self.w2)

    def describe(self, factor: float) -> str:
        return f"LoKr scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        w1 = [read_entry(entry, device, dtype) for entry in self.w1]
        left = w1[0] @ w1[1] if len(w1) > 1 else w1[0]
        w2 = [read_entry(entry, device, dtype) for entry in self.w2]
        a, b, scale = len(left), w2[0].shape[1 if len(w2) > 2 else 0], self.scale * factor

        def right(j: Tensor) -> Tensor:
            if len(w2) > 2:
                return torch.einsum("ijkl,ib,jd->bdkl", w2[2], w2[0][:, j], w2[1])
            return w2[0][j] if len(w2) == 1 else w2[0][j] @ w2[1]

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            at = torch.arange(start, stop, device=device)
            if w2[0].ndim == 3:  # PEFT's kron of (a, c) and (b, d, k) is (b, a * d, c * k), and trained so
                value = left[at % a][:, None, :, None] * right(at // a)[:, :, None, :]
            else:
                w2_rows = right(at % b) if len(at) < b else right(torch.arange(b, device=device))[at % b]
                value = left[at // b][:, :, None] * w2_rows.flatten(1)[:, None, :]
            return (value * scale).flatten(1)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    effective = trained.get("lokr_t2") is not None
    w1, wanted = _form(trained, "lokr_w1", {2: ("a", "c")}, (("a", "r"), ("r", "c")))
    w2, more = _form(
        trained, "lokr_w2", _WHOLE, (("r", "b"), ("r", "d")) if effective else (("b", "r"), ("r", "d"))
    )
    if effective:
        if len(w2) == 1:
            raise trained.refuse("has both lokr_w2 and lokr_t2")
        w2, more = (*w2, trained["lokr_t2"]), {**more, "lokr_t2": ("r", "r", "k", "l")}
    check_floats(trained, *w1, *w2)
    sizes = check_shapes(trained, {**wanted, **more})
    rank = pattern_value(trained.module, trained.config.get("rank_pattern"), trained.config["r"])
    if sizes.get("r", rank) != rank:
        raise trained.refuse(f"has rank {sizes['r']}, but the config says {rank}")
    alpha = pattern_value(trained.module, trained.config.get("alpha_pattern"), trained.config["alpha"])
    columns = prod(sizes.get(letter, 1) for letter in "cdkl")
    return [Lokr(trained.module, "weight", (sizes["a"] * sizes["b"], columns), w1, w2, alpha / rank)]


def _form(
    trained: Trained,
    name: str,
    whole: Mapping[int, tuple[str, ...]],
    pair: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[tuple[Entry, ...], dict[str, tuple[int | str, ...]]]:
    """The tensors that are, or make up, one side of the product, and what shapes they must have."""
    a, b = f"{name}_a", f"{name}_b"
    one = trained.get(name)
    if one is None:
        return (trained[a], trained[b]), {a: pair[0], b: pair[1]}
    if trained.get(a) or trained.get(b):
        raise trained.refuse(f"has both {name} and its factors")
    return (one,), {name: whole.get(len(one.shape), max(whole.values(), key=len))}


def _wrong(config: Mapping[str, Any]) -> list[str]:
    patterns = {"rank_pattern": True, "alpha_pattern": False}
    return wrong_values(config, counts=["r"], numbers=["alpha"], patterns=patterns)


KIND = Kind(
    peft_type="LOKR",
    tensors=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    fields=frozenset(
        [
            "r",
            "alpha",
            "rank_dropout",
            "rank_dropout_scale",
            "module_dropout",
            "use_effective_conv2d",
            "decompose_both",
            "decompose_factor",
            "init_weights",
        ]
    ),
    read=read,
    wrong=_wrong,
)
