"""LoRA on a bare parameter, above all on stacked experts (PEFT's target_parameters).

A is (experts * rank, i) with the expert as its slowest axis, B (o, rank * experts) with the expert as its
fastest; D[e] = scale * B[:, :, e] @ A[e] is (o, i), and lies as it is or transposed in the parameter
(experts, d1, d2), as the shapes tell. In a square one the writer's version decides (PEFT #3083, #3165).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.names import turns_experts
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Experts(Delta):
    """`shape` is (experts, o, i) until `on` knows the parameter's; two dimensions where there is one expert.

    `transposed` is None while only the shape can tell. `expert_major`: B is (o, experts * rank), as
    Unsloth packs it, which no shape tells.
    """

    A: Entry
    B: Entry
    scale: float
    rank_: int
    transposed: bool | None = None
    expert_major: bool = False

    @property
    def stacked(self) -> bool:
        return True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B)

    @property
    def rank(self) -> int:
        return self.rank_

    @property
    def num_experts(self) -> int:
        return self.A.shape[0] // self.rank_

    @property
    def is_square(self) -> bool:
        """Whether no shape tells how the experts lie."""
        return self.A.shape[1] == self.B.shape[0] and len(self.shape) == 3

    def describe(self, factor: float) -> str:
        return f"LoRA rank {self.rank_} scale {self.scale * factor:g} on {self.num_experts} experts"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        o, i = self.B.shape[0], self.A.shape[1]
        fits = [(self.num_experts, o, i), (self.num_experts, i, o)] + [(o, i)] * (self.num_experts == 1)
        return None if shape in fits else f"was made for {self.num_experts} experts {[o, i]} or {[i, o]}"

    def on(self, shape: tuple[int, ...]) -> Experts:
        if len(shape) == 2:
            return replace(self, shape=shape, transposed=False)
        if not self.is_square:
            return replace(self, shape=shape, transposed=shape[1:] != (self.B.shape[0], self.A.shape[1]))
        assert self.transposed is not None, "a square parameter has to be settled before"
        return replace(self, shape=shape)

    def turned(self) -> Experts:
        assert self.transposed is not None
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return replace(self, shape=shape, transposed=not self.transposed)

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        E, r = self.num_experts, self.rank_
        A = read_entry(self.A, device, dtype).view(E, r, -1)
        B = read_entry(self.B, device, dtype)
        B = B.view(-1, E, r).transpose(0, 1) if self.expert_major else B.view(-1, r, E).permute(2, 0, 1)
        left, right = (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed else (B, A)
        left, right = left.contiguous(), right.contiguous()
        height, scale = left.shape[1], self.scale * factor

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            parts = []
            for e in range(start // height, -(-stop // height)):
                low, high = max(start - e * height, 0), min(stop - e * height, height)
                parts.append(left[e, low:high] @ right[e])
            return torch.cat(parts).mul_(scale) if len(parts) > 1 else parts[0].mul_(scale)

        yield rows


def settled(delta: Experts, model_type: str | None, peft_version: Any) -> Experts | str:
    """The delta with its orientation known, by the writer's version; a reason where that does not tell."""
    if not delta.is_square or delta.transposed is not None:
        return delta
    version = version_of(peft_version)
    if version is None:
        return f"is square, and peft_version {peft_version!r} does not tell which way its experts lie"
    if version < (0, 19, 0):
        return replace(delta, transposed=True)
    declared = turns_experts(model_type)
    return replace(delta, transposed=not declared if version == (0, 19, 0) else declared)


def version_of(text: Any) -> tuple[int, int, int] | None:
    """PEFT's version as its config has it; that before the field came where there is none."""
    if text is None:
        return (0, 17, 0)  # the field came with 0.18
    if not isinstance(text, str):
        return None
    parts = text.replace("+", ".").split(".")[:3]
    digits = ["".join(c for c in part if c.isdigit()) if part[:1].isdigit() else "" for part in parts]
    if len(digits) < 3 or not all(digits) or "dev" in text:
        return None
    return (int(digits[0]), int(digits[1]), int(digits[2]))
