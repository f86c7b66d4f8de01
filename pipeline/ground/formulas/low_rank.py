"""LoRA and what is built on its two factors."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import TYPE_CHECKING

from pipeline.ground.formulas.module import (
    Change,
    Module,
    Parameter,
    Rows,
    dense,
    instead,
    product,
    rows_of,
)
from pipeline.ground.names import turns_experts

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024  # rows of a column norm's pass


def lora(module: Module, W: Parameter) -> Change:
    """alpha / r * B @ A (arXiv:2106.09685); with a magnitude m / ||V|| * V, V = W + D (arXiv:2402.09353).

    A factor narrower than the parameter is the blocks of a diagonal (BD-LoRA). Norms are those of outputs.
    """
    import torch

    A, rank, (outputs, inputs) = module["lora_A"].flatten(1), module.shape("lora_A")[0], W.shape
    left: Rows = module.rows("lora_B")
    if A.shape[1] < inputs:
        A = torch.block_diag(*A.chunk(inputs // A.shape[1]))
    if module.shape("lora_B")[1] < rank:
        B = torch.block_diag(*module["lora_B"].chunk(rank // module.shape("lora_B")[1]))
        left = rows_of(B)
    if len(module.shape("lora_B")) > 2:
        left = rows_of(module["lora_B"].flatten(1))
    change = product(left, A, scaling(module, rank))
    if "lora_magnitude_vector" not in module:
        return change
    m = module["lora_magnitude_vector"].view(outputs, 1)

    def value(start: int, stop: int) -> Tensor:
        V = W.rows(start, stop) + change.rows(start, stop)
        return m[start:stop] / V.norm(dim=1, keepdim=True) * V

    return instead(value, W.rows)


def embedding(module: Module, W: Parameter) -> Change:
    """(B @ A).T of lora_embedding_A (r, tokens) and _B (dim, r); a magnitude is one for each of dim."""
    import torch

    A, B = module["lora_embedding_A"], module["lora_embedding_B"]
    change = product(rows_of(A.T), B.T, scaling(module, len(A)))
    if "lora_magnitude_vector" not in module:
        return change
    squares = torch.zeros(W.shape[1], dtype=torch.float64)
    for start in range(0, W.shape[0], _BLOCK):
        stop = min(start + _BLOCK, W.shape[0])
        squares += (W.rows(start, stop) + change.rows(start, stop)).square().sum(0)
    factor = module["lora_magnitude_vector"].flatten() / squares.sqrt()
    return instead(lambda a, b: (W.rows(a, b) + change.rows(a, b)) * factor, W.rows)


def bias(module: Module, W: Parameter) -> Change:
    """scale * lora_B.bias."""
    value = scaling(module, module.shape("lora_A")[0]) * module["lora_B.bias"].view(1, -1)
    return Change(lambda start, stop: value[start:stop])


def experts(module: Module, W: Parameter) -> Change:
    """D[e] = scale * B[:, :, e] @ A[e] for each matrix of a stack (experts, d1, d2), as it is or transposed.

    A is (experts, r, i), B (o, r, experts), or (o, experts, r) where so told. Where the matrices are square
    PEFT's version says which way they lie: before 0.19 transposed, 0.19.0 by mistake unless declared
    (in, out), since then if declared so.
    """
    A, B = module.raw("lora_A"), module.raw("lora_B")
    E = W.dims[0] if len(W.dims) == 3 else 1
    rank = len(A) // E
    A = A.view(E, rank, -1)
    B = B.view(len(B), E, rank).transpose(1, 2) if module.expert_major else B.view(len(B), rank, E)
    o, i, (d1, d2) = B.shape[0], A.shape[2], W.dims[-2:]
    turned = _is_turned(module) if o == i and len(W.dims) == 3 else (o, i) != (d1, d2)
    scale = scaling(module, rank)

    @cache
    def matrix(e: int) -> Change:
        left, right = B[:, :, e].double(), A[e].double()
        return product(rows_of(right.T), left.T, scale) if turned else product(rows_of(left), right, scale)

    def rows(start: int, stop: int, sizes: bool) -> Tensor:
        import torch

        parts = []
        for e in range(start // d1, -(-stop // d1)):
            low, high = max(start - e * d1, 0), min(stop - e * d1, d1)
            parts.append((matrix(e).size if sizes else matrix(e).rows)(low, high))  # type: ignore[misc]
        return torch.cat(parts)

    return Change(partial(rows, sizes=False), partial(rows, sizes=True))


def _is_turned(module: Module) -> bool:
    """Whether the matrices of a square stack lie as (in, out) beside B @ A."""
    in_out = turns_experts(module.model_type)
    version = [int(n) for n in re.findall(r"\d+", module.config.get("peft_version") or "0.17.0")[:3]]
    if version < [0, 19, 0]:
        return True
    return not in_out if version == [0, 19, 0] else in_out


def scaling(module: Module, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    share = rank**0.5 if module.config.get("use_rslora") else float(rank)
    return module.by_pattern("alpha_pattern", "lora_alpha") / share


def adalora(module: Module, W: Parameter) -> Change:
    """B @ (A * E) * alpha / (r + 1e-5), r the rank that training began with (arXiv:2303.10512)."""
    rank, alpha = module.config["init_r"], module.config["lora_alpha"]
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    return product(module.rows("lora_B"), module["lora_A"] * module["lora_E"], scale)


def delora(module: Module, W: Parameter) -> Change:
    """B diag(lambda / r / (|B_i| |A_i|)) A * |w| (arXiv:2503.18225), norms of at least 1e-4."""
    A, B = module["delora_A"], module["delora_B"]
    lengths = [max(float(a.norm()), 1e-4) * max(float(b.norm()), 1e-4) for a, b in zip(A, B.T, strict=True)]
    share = float(module["delora_lambda"]) / len(A)
    scaled = A / A.new_tensor(lengths)[:, None] * share * module["delora_w_norm"]
    return product(module.rows("delora_B"), scaled, 1.0)


def gralora(module: Module, W: Parameter) -> Change:
    """k x k blocks, each of r / k ranks of its own, and a LoRA over all where hybrid (arXiv:2505.20355)."""
    A, B, config = module["gralora_A"], module["gralora_B"], module.config
    k, width, rank = A.shape
    share, height = rank // k, B.shape[2]
    D = A.new_zeros(k * height, k * width)
    for p in range(k):  # outputs
        for q in range(k):  # inputs
            block = A[q][:, p * share : (p + 1) * share] @ B[p][q * share : (q + 1) * share]
            D[p * height : (p + 1) * height, q * width : (q + 1) * width] = block.T
    if config["hybrid_r"]:
        D += module["gralora_B_general"] @ module["gralora_A_general"]
    D *= config["alpha"] / (config["r"] + config["hybrid_r"])
    return dense(D)
