"""RandLoRA: delta = B' @ A' * alpha / r, a sum over n full-rank random bases (Albert et al., arXiv:2502.00987).

A (r, 1, least) and B (most, N, r) are shared: the module takes B' = B[:most, :n] as (most, n * r) and A' =
lambda * A[..., :least] * gamma as (r * n, least); least and most are the smaller and larger of its
features, n = ceil(least / r). Where the outputs are fewer the delta is the transpose. (PEFT flattens B' over
(n, r) and A' over (r, n), and trains so.) With save_projection=false A and B are drawn again as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes, is_count
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import PipelineError
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_BASES = ("randlora_A", "randlora_B")


@dataclass(frozen=True)
class RandLora(Delta):
    """`lambdas` (r, n), `gamma` (n, least); `saved` A and B, and `copies` of them that PEFT writes per module.

    Else `key`, `sparsity` and `largest` (out, in) tell them. sparsity s: -1 and 1 with odds 1 in 2s each.
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
        shapes = [delta.shape for delta in deltas if isinstance(delta, RandLora)]
        return replace(self, largest=(max(s[0] for s in shapes), max(s[1] for s in shapes)))

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        A, B = (x.to(device, torch_dtype(dtype)) for x in self._bases(base))
        lambdas, gamma = (read_entry(x, device, dtype) for x in (self.lambdas, self.gamma))
        r, n, least, most = *lambdas.shape, min(self.shape), max(self.shape)
        A = (lambdas[:, :, None] * A[:, :, :least] * gamma).flatten(0, 1)
        B = B[:most, :n].flatten(1)
        outputs, inputs = self.shape
        left, right = (B, A) if outputs >= inputs else (A.T, B.T)
        scale = self.scale * factor

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (left[start:stop] @ right).mul_(scale)

        yield rows

    def _bases(self, base: Base) -> tuple[Tensor, Tensor]:
        import torch

        if not self.saved:
            kind = base(0, 1).dtype
            A, B = self._draw()
            return A.to(kind), B.to(kind)
        A, B = (read_entry(entry) for entry in self.saved)
        for shared, own in zip((A, B), self.copies, strict=bool(self.copies)):
            if not torch.equal(read_entry(own), shared):
                raise PipelineError(f"'{own.name}' differs from what all modules share")
        return A, B

    def _draw(self) -> tuple[Tensor, Tensor]:
        """A and B with unit deviation: uniform in bfloat16, or -1, 0 and 1 in float32."""
        import torch

        if self.largest is None:
            raise AssertionError("bases that are drawn need `among` beforehand")
        generator = torch.Generator("cpu").manual_seed(self.key)
        r, most, least = self.lambdas.shape[0], max(self.largest), min(self.largest)
        n = -(-least // r)
        if self.sparsity:
            s = sqrt(least) if self.sparsity == "very_sparse" else 3
            odds = 1 / (2 * s)
            draws = (torch.rand(shape, generator=generator) for shape in ((r, 1, least), (most, n, r)))
            A, B = ((u > 1 - odds).float() - (u < odds).float() for u in draws)
        else:

            def uniform(*shape: int) -> Tensor:
                empty = torch.empty(shape, dtype=torch.bfloat16)
                return torch.nn.init.kaiming_uniform_(empty, a=sqrt(5), generator=generator)

            A = uniform(r, 1, least)
            B = torch.cat([uniform(most, 1, r) for _ in range(n)], dim=1)
        return A / A.std(), B / B.std()


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
    scale, key = config["randlora_alpha"] / r, config.get("projection_prng_key", 0)
    shape = (UNKNOWN, UNKNOWN)
    return [RandLora(trained.module, "weight", shape, lambdas, gamma, scale, saved, copies, key, sparsity)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    flags = ["save_projection", "sparse", "very_sparse"]
    wrong = wrong_values(config, counts=["r"], numbers=["randlora_alpha"], flags=flags)
    key = config.get("projection_prng_key", 0)
    if key != 0 and not is_count(key) or isinstance(key, bool):
        wrong.append(f"projection_prng_key is {key!r}, not a seed")
    return wrong


KIND = Kind(
    peft_type="RANDLORA",
    tensors=("randlora_lambda", "randlora_gamma", *_BASES),
    shared=_BASES,
    fields=frozenset(
        "r projection_prng_key save_projection sparse very_sparse randlora_dropout randlora_alpha "
        "init_weights".split()
    ),
    read=read,
    wrong=_wrong,
)
