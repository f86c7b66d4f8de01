"""RandLoRA: delta = B' @ A' * alpha / r, a sum over n random bases (Albert et al. 2025, arXiv:2502.00987).

A (r, 1, ..) and B (.., .., r) are shared. A module whose features are least <= most in number takes B' =
B[:most, :n] as (most, n * r) and A' = lambda * A[..., :least] * gamma as (r * n, least), n = ceil(least / r);
with fewer outputs than inputs the delta is the transpose. (PEFT flattens B' over (n, r) but A' over (r, n),
and trains so.) With save_projection=false A and B are drawn again from projection_prng_key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas import projection
from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import PipelineError
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_BASES = ("randlora_A", "randlora_B")


@dataclass(frozen=True)
class RandLora(Delta):
    """`lambdas` (r, n), `gamma` (n, least); `saved`: A and B, else `key` and `largest` (out, in) tell them.

    `copies`: A and B once more, as PEFT writes them for every module.
    """

    lambdas: Entry
    gamma: Entry
    scale: float
    saved: tuple[Entry, ...]
    copies: tuple[Entry, ...]
    key: int
    sparsity: str | None = None
    largest: tuple[int, int] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.lambdas, self.gamma, *self.saved, *self.copies)

    @property
    def state_bytes(self) -> int:
        drawn = max(self.largest) * (min(self.largest) + self.lambdas.shape[0]) if self.largest else 0
        return 2 * super().state_bytes + (0 if self.saved else 24 * drawn)

    def describe(self, factor: float) -> str:
        return f"RandLoRA {self.lambdas.shape[1]} bases scale {self.scale * factor:g}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2 or min(shape) != self.gamma.shape[1]:
            return f"was made for a weight whose smaller side is {self.gamma.shape[1]}"
        if self.saved and max(shape) > self.saved[1].shape[0]:
            return f"shares a randlora_B for {self.saved[1].shape[0]} features, fewer than {max(shape)}"
        return super().misfit(shape)

    def among(self, deltas: Sequence[Delta]) -> RandLora:
        return replace(self, largest=projection.largest(deltas, RandLora))

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        A, B = (x.to(device, torch_dtype(dtype)) for x in self._bases(base))
        lambdas, gamma = (read_entry(x, device, dtype) for x in (self.lambdas, self.gamma))
        A = (lambdas[:, :, None] * A[:, :, : gamma.shape[1]] * gamma).flatten(0, 1)
        B = B[: max(self.shape), : gamma.shape[0]].flatten(1)
        left, right = (B, A) if self.shape[0] >= self.shape[1] else (A.T, B.T)
        scale = self.scale * factor

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (right.T @ left[start:stop].T).T.contiguous().mul_(scale)  # turned, as PEFT has it

        yield rows

    def _bases(self, base: Base) -> tuple[Tensor, Tensor]:
        import torch

        if not self.saved:
            assert self.largest, "bases that are drawn need `among` beforehand"
            created = base(0, 1).dtype
            A, B = projection.randlora(self.key, self.lambdas.shape[0], self.largest, self.sparsity)
            return A.to(created), B.to(created)
        A, B = (read_entry(entry) for entry in self.saved)
        for shared, own in zip((A, B), self.copies, strict=bool(self.copies)):
            if not torch.equal(read_entry(own), shared):
                raise PipelineError(f"'{own.name}' differs from what all modules share")
        return A, B


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    config, r = trained.config, trained.config["r"]
    lambdas, gamma = trained["randlora_lambda"], trained["randlora_gamma"]
    check_floats(trained, lambdas, gamma)
    wanted = {"randlora_lambda": (r, "n"), "randlora_gamma": ("n", "least")}
    sizes = check_shapes(trained, wanted)
    if sizes["n"] != -(-sizes["least"] // r):
        raise trained.refuse(f"has {sizes['n']} bases of rank {r} for {sizes['least']} features")
    saved: tuple[Entry, ...] = ()
    copies = tuple(trained[name] for name in _BASES) if any(map(trained.get, _BASES)) else ()
    if config.get("save_projection", True) or trained.shared or copies:
        A, B = saved = tuple(trained.common(name) for name in _BASES)
        check_floats(trained, A, B)
        fits = len(A.shape) == len(B.shape) == 3 and A.shape[:2] == (r, 1) and B.shape[2] == r
        if not fits or A.shape[2] < sizes["least"] or B.shape[1] < sizes["n"]:
            raise trained.refuse(
                f"needs {sizes['n']} bases of rank {r} for {sizes['least']} features: randlora_A "
                f"{list(A.shape)} and randlora_B {list(B.shape)} do not cover that"
            )
    sparsity = next((name for name in ("very_sparse", "sparse") if config.get(name)), None)
    scale, key = config["randlora_alpha"] / r, config["projection_prng_key"]
    shape = (UNKNOWN, UNKNOWN)
    return [RandLora(trained.module, "weight", shape, lambdas, gamma, scale, saved, copies, key, sparsity)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    flags = ["save_projection", "sparse", "very_sparse"]
    return wrong_values(config, ["r"], ["randlora_alpha"], flags, ["projection_prng_key"])


KIND = Kind(
    peft_type="RANDLORA",
    tensors=("randlora_lambda", "randlora_gamma", *_BASES),
    shared=_BASES,
    fields=frozenset(
        [
            "r",
            "projection_prng_key",
            "save_projection",
            "sparse",
            "very_sparse",
            "randlora_dropout",
            "randlora_alpha",
            "init_weights",
        ]
    ),
    read=read,
    wrong=_wrong,
)
