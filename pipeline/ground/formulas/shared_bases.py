"""Factors that all modules of an adapter share: random matrices, or a bank of vectors."""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING

from pipeline.ground.formulas.module import Change, Module, Parameter

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def vera(module: Module, W: Parameter) -> Change:
    """(lambda_b * B) @ (lambda_d * A) of the first rows of B and columns of A (arXiv:2310.11454)."""
    b, d = module["vera_lambda_b"], module["vera_lambda_d"]
    if "vera_A" in module.shared:
        A, B = module["vera_A"], module["vera_B"]
    else:
        A, B = _drawn_vera(module, len(d), W.dtype())
    right = d[:, None] * A[:, : W.shape[1]]
    return Change(lambda start, stop: (b[start:stop, None] * B[start:stop]) @ right)


def _drawn_vera(module: Module, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (r, most in) and B (most out, r), uniform in +-sqrt(6 / columns), drawn as PEFT does."""
    import torch

    generator = torch.Generator("cpu").manual_seed(module.config["projection_prng_key"])
    outputs, inputs = module.largest
    drawn = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = sqrt(3) * sqrt(2) / sqrt(shape[1])
        value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        drawn.append(value.to(dtype).double())
    return drawn[0], drawn[1]


def randlora(module: Module, W: Parameter) -> Change:
    """alpha / r * sum over n bases of B_k diag(lambda_k) A diag(gamma_k) (arXiv:2502.00987).

    PEFT flattens B over (n, r), but lambda * A * gamma over (r, n), and trains so. It makes a matrix (most,
    least); of fewer outputs than inputs that is the transpose.
    """
    scales, gamma, rank = module["randlora_lambda"], module["randlora_gamma"], module.config["r"]
    if "randlora_A" in module.shared:
        A, B = module["randlora_A"], module["randlora_B"]
    else:
        A, B = (x.to(W.dtype()).double() for x in _drawn_randlora(module))
    most, least = max(W.shape), min(W.shape)
    n = ceil(least / rank)
    left = B[:most, :n].reshape(most, n * rank)
    right = (scales.view(rank, n, 1) * A[:, :, :least] * gamma.view(1, n, least)).reshape(rank * n, least)
    if W.shape[0] < W.shape[1]:
        left, right = right.T, left.T
    scale = module.config["randlora_alpha"] / rank
    return Change(lambda start, stop: scale * (left[start:stop] @ right))


def _drawn_randlora(module: Module) -> tuple[Tensor, Tensor]:
    """A (r, 1, least) and B (most, n, r), of unit deviation: uniform in bfloat16, or of -1, 0 and 1."""
    import torch

    config = module.config
    generator = torch.Generator("cpu").manual_seed(config["projection_prng_key"])
    most, least, rank = max(module.largest), min(module.largest), config["r"]
    n = ceil(least / rank)
    if config.get("sparse") or config.get("very_sparse"):
        odds = 1 / (2 * (sqrt(least) if config.get("very_sparse") else 3))
        drawn = [torch.rand(shape, generator=generator) for shape in ((rank, 1, least), (most, n, rank))]
        signs = [torch.where(x < odds, -1.0, torch.where(x > 1 - odds, 1.0, 0.0)) for x in drawn]
        return signs[0] / signs[0].std(), signs[1] / signs[1].std()
    parts = []
    for shape in ((rank, 1, least), *[(most, 1, rank)] * n):
        bound = 1 / sqrt(shape[1] * shape[2])  # Kaiming's for a slope of sqrt(5)
        parts.append(torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator))
    A, B = parts[0], torch.cat(parts[1:], 1)
    return A / A.std(), B / B.std()


def vblora(module: Module, W: Parameter) -> Change:
    """B @ A, every piece of which is a mix of k vectors of the bank (arXiv:2405.15179)."""
    A = _pieces(module, "vblora_logits_A").flatten(1)
    B = _pieces(module, "vblora_logits_B").transpose(1, 2).flatten(0, 1)
    return Change(lambda start, stop: B[start:stop] @ A)


def _pieces(module: Module, name: str) -> Tensor:
    """(.., .., length): shares sum to one, the softmax of the k largest logits or as the file has them."""
    import torch

    bank = module["vblora_vector_bank"]
    if name in module:
        logits, which = module[name].topk(module.config["topk"], dim=-1)
        shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    else:
        which, shares = module.raw(f"{name}_topk_indices").long(), module[f"{name}_topk_weights"]
        shares = torch.cat([shares, (1 - shares.sum(-1, keepdim=True)).clamp(min=0)], -1)
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = bank.new_zeros(*which.shape[:-1], bank.shape[1])
    for k in range(which.shape[-1]):
        mixed += shares[..., k, None] * bank[which[..., k]]
    return mixed
