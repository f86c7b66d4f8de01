"""GraLoRA: k * k blocks, each with a low-rank product of its own (Jung et al. 2025, arXiv:2505.20355).

In the block of outputs p and inputs q, delta = scale * (A[q][:, p's share] @ B[p][q's share]).T, a share
being r / k of the r ranks; a hybrid adds a LoRA over all, and scale = alpha / (r + hybrid_r).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True)
class Gralora(Delta):
    """`A` (k, in / k, r), `B` (k, r, out / k); `general` is a hybrid's (hybrid_r, in) and (out, hybrid_r)."""

    A: Entry
    B: Entry
    general: tuple[Entry, ...]
    scale: float

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B, *self.general)

    def describe(self, factor: float) -> str:
        k, _, r = self.A.shape
        return f"GraLoRA rank {r} in {k} x {k} blocks scale {self.scale * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        A, B = read_entry(self.A, device, dtype), read_entry(self.B, device, dtype)
        general = [read_entry(entry, device, dtype) for entry in self.general]
        k, _, r = A.shape
        share, height = r // k, B.shape[2]

        def block_rows(p: int, start: int, stop: int) -> Tensor:
            left = B[p].view(k, share, height)[:, :, start:stop].mT  # (inputs q, out, share)
            right = A[:, :, p * share : (p + 1) * share].mT  # (inputs q, share, in / k)
            return (left @ right).transpose(0, 1).flatten(1)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            parts = [
                block_rows(p, max(start - p * height, 0), min(stop - p * height, height))
                for p in range(start // height, -(-stop // height))
            ]
            delta = torch.cat(parts)
            if general:
                delta += general[1][start:stop] @ general[0]
            return delta.mul_(self.scale * factor)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    config = trained.config
    k, r, hybrid = config["gralora_k"], config["r"], config["hybrid_r"]
    shapes: dict[str, tuple[int | str, ...]] = {"gralora_A": (k, "in / k", r), "gralora_B": (k, r, "out / k")}
    if not hybrid and any(suffix in trained.tensors for suffix in _GENERAL):
        raise trained.refuse("has gralora_A_general or gralora_B_general, but the config's hybrid_r is 0")
    A, B, *general = (trained[suffix] for suffix in (*shapes, *(_GENERAL if hybrid else ())))
    check_floats(trained, A, B, *general)
    sizes = check_shapes(trained, shapes)
    shape = (sizes["out / k"] * k, sizes["in / k"] * k)
    if hybrid:
        check_shapes(trained, {_GENERAL[0]: (hybrid, shape[1]), _GENERAL[1]: (shape[0], hybrid)})
    scale = config["alpha"] / (r + hybrid)
    return [Gralora(trained.module, "weight", shape, A, B, tuple(general), scale)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    hybrid = ["hybrid_r"] if config.get("hybrid_r") != 0 else []
    found = wrong_values(config, counts=["r", "gralora_k", *hybrid], numbers=["alpha"])
    if not found and config["r"] % config["gralora_k"]:
        found.append(f"r is {config['r']}, which gralora_k, {config['gralora_k']}, does not divide")
    return found


KIND = Kind(
    peft_type="GRALORA",
    tensors=("gralora_A", "gralora_B", *_GENERAL),
    fields=frozenset({"r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout", "init_weights"}),
    read=read,
    wrong=wrong,
)
