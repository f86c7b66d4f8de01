"""MiSS: one block of rows for all groups of inputs, delta[i, j] = B[j mod r, i] (arXiv:2409.15371).

"mini" repeats B along the outputs as well. "bat" multiplies by the base: in every (r, r) block X of the
rows that B_o belongs to, X' = X + X B_o + B_o. Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with
an Efficient Shard-Sharing Structure", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Miss(Delta):
    """`B` (r, out), or (r, mini_r) which is repeated along the outputs."""

    B: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.B,)

    def describe(self, factor: float) -> str:
        return f"MiSS r {self.B.shape[0]}" + (f" scale {factor:g}" if factor != 1 else "")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        r, mini_r = self.B.shape
        told = super().misfit(shape)
        if told is None and (shape[1] < r or shape[0] % mini_r):
            return f"was made for at least {r} inputs and outputs in groups of {mini_r}"
        return told

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        outputs = read_entry(self.B, device, dtype).T * factor  # (out or mini_r, r)
        repeats = -(-self.num_columns // outputs.shape[1])

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            here = torch.arange(start, stop, device=device) % len(outputs)
            return outputs[here].repeat(1, repeats)[:, : self.num_columns]

        yield rows


@dataclass(frozen=True)
class MissBat(Delta):
    """`B` (out / r, r, r)."""

    B: Entry

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.B,)

    @property
    def grain(self) -> int:
        return self.B.shape[1]

    def describe(self, factor: float) -> str:
        return f"MiSS bat r {self.B.shape[1]}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        told, r = super().misfit(shape), self.B.shape[1]
        return f"was made for inputs in groups of {r}" if told is None and shape[1] % r else told

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        blocks = read_entry(self.B, device, dtype)
        r = blocks.shape[1]

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            B = blocks[start // r : stop // r]
            X = W.to(torch_dtype(dtype)).reshape(len(B), -1, r)  # each row of a block in pieces of r
            delta = (X @ B).view(len(B), r, -1, r) + B[:, :, None]
            return (X + delta.view(X.shape)).view(W.shape)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    entry, config = trained["miss_block"], trained.config
    check_floats(trained, entry)
    init, r = config.get("init_weights", True), config["r"]
    if init == "bat":
        sizes = check_shapes(trained, {"miss_block": ("blocks", r, r)})
        return [MissBat(trained.module, "weight", (sizes["blocks"] * r, UNKNOWN), entry)]
    if init == "mini":
        check_shapes(trained, {"miss_block": (r, config["mini_r"])})
        return [Miss(trained.module, "weight", (UNKNOWN, UNKNOWN), entry)]
    sizes = check_shapes(trained, {"miss_block": (r, "out")})
    return [Miss(trained.module, "weight", (sizes["out"], UNKNOWN), entry)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    init = config.get("init_weights", True)
    found = wrong_values(config, counts=["r", "mini_r"] if init == "mini" else ["r"])
    if init not in (True, False, "bat", "mini"):
        found.append(f"init_weights is {init!r}; MiSS has true, false, 'bat' and 'mini'")
    return found


KIND = Kind(
    peft_type="MISS",
    tensors=("miss_block",),
    fields=frozenset({"r", "mini_r", "miss_dropout", "init_weights"}),
    read=read,
    wrong=wrong,
)
