"""Inputs turned before the weight sees them: W' = W R^T."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.ground.formulas.module import Change, Module, Parameter, instead

if TYPE_CHECKING:
    from torch import Tensor


def oft(module: Module, W: Parameter) -> Change:
    """R block-diagonal, of skew Q the Cayley transform or the first terms of its series (arXiv:2306.07280,
    arXiv:2506.19847); an embedding is turned the other way.
    """
    import torch

    embedding = "oft_embedding_R" in module
    triangles = module["oft_embedding_R" if embedding else "oft_R"]
    size = next(n for n in range(1, 2**16) if n * (n - 1) // 2 >= triangles.shape[1])
    blocks = []
    for triangle in triangles:
        Q = triangle.new_zeros(size, size)
        Q[tuple(torch.triu_indices(size, size, 1))] = triangle
        blocks.append(_rotation(Q - Q.T, module, len(triangles)))
    blocks *= W.shape[1] // size // len(blocks)  # one block may be shared by all places

    def value(start: int, stop: int) -> Tensor:
        parts = W.rows(start, stop).split(size, 1)
        return torch.cat([X @ (R if embedding else R.T) for X, R in zip(parts, blocks, strict=True)], 1)

    return instead(value, W.rows)


def _rotation(Q: Tensor, module: Module, num_blocks: int) -> Tensor:
    """Of PEFT's series the last power counts once since 0.18, to three terms a fourth; before, all twice."""
    import torch

    config, eye = module.config, torch.eye(len(Q), dtype=Q.dtype)
    if config.get("coft"):
        most = config["eps"] / num_blocks**0.5
        Q = Q if float(Q.norm()) <= most else Q * (most / Q.norm())
    if not config["use_cayley_neumann"]:
        return (eye - Q) @ torch.linalg.inv(eye + Q)
    terms, version = config["num_cayley_neumann_terms"], str(config.get("peft_version") or "0.17").split(".")
    factors = [1.0] + [2.0] * (terms - 1)
    if terms > 2 and (int(version[0]), int(version[1])) >= (0, 18):
        factors = [1.0, 2.0, 2.0, *[2.0] * (terms - 4), 1.0]
    R = torch.zeros_like(Q)
    for factor in reversed(factors):  # Horner
        R = R @ Q + factor * eye
    return R


def boft(module: Module, W: Parameter) -> Change:
    """W' = diag(s) W (M_m ... M_1)^T, M_i blocks of Cayley transforms between shuffles (arXiv:2311.06243).

    The shuffle of level i takes, in each run of 2^i blocks, the half blocks at even places first.
    """
    import torch

    R, s = module["boft_R"], module["boft_s"].reshape(-1, 1)
    num_blocks, size = R.shape[1:3]
    eye, levels = torch.eye(size, dtype=R.dtype), []
    for level, blocks in enumerate(R):
        skew = [(block - block.T) / 2 for block in blocks]
        cayley = [(eye - Q) @ torch.linalg.inv(eye + Q) for Q in skew]
        half, run = size // 2, 2**level
        order = [*range(num_blocks * size)]
        if level:
            order = []
            for first in range(0, 2 * num_blocks, 2 * run):
                places = [*range(first, first + 2 * run, 2), *range(first + 1, first + 2 * run, 2)]
                order += [place * half + k for place in places for k in range(half)]
        levels.append((cayley, torch.tensor(order)))

    def value(start: int, stop: int) -> Tensor:
        X = W.rows(start, stop)
        for cayley, order in levels:  # X (P D P^T)^T, row j of P having its one at order[j]
            Y = torch.empty_like(X)
            Y[:, order] = X
            Y = torch.cat([part @ C.T for part, C in zip(Y.split(size, 1), cayley, strict=True)], 1)
            X = Y[:, order]
        return X * s[start:stop]

    return instead(value, W.rows)


def hra(module: Module, W: Parameter) -> Change:
    """W' = W H_1 ... H_r, H = I - 2 u u^T (arXiv:2405.17484); with apply_GS the planes are orthogonal."""
    import torch

    U = module["hra_u"]
    U = torch.linalg.qr(U).Q if module.config.get("apply_GS") else U / U.norm(dim=0)

    def value(start: int, stop: int) -> Tensor:
        X = W.rows(start, stop)
        for u in U.T:
            X = X - 2 * torch.outer(X @ u, u)
        return X

    return instead(value, W.rows)
