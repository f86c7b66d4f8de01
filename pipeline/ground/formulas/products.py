"""Elementwise and Kronecker products of low-rank factors."""

from __future__ import annotations

from pipeline.ground.formulas.module import Change, Module, Parameter, Rows, dense, rows_of


def loha(module: Module, W: Parameter) -> Change:
    """(w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r (arXiv:2108.06098); kernels may have cores t1, t2."""
    rank = module.shape("hada_w1_b")[0]
    first, second = (_hada(module, n) for n in "12")
    scale = module.by_pattern("alpha_pattern", "alpha") / rank
    return Change(lambda start, stop: scale * first(start, stop) * second(start, stop))


def _hada(module: Module, n: str) -> Rows:
    import torch

    a, b = module[f"hada_w{n}_a"], module[f"hada_w{n}_b"]
    if f"hada_t{n}" not in module:
        return lambda start, stop: a[start:stop] @ b
    return rows_of(torch.einsum("ijkl,ip,jr->prkl", module[f"hada_t{n}"], a, b).flatten(1))


def lokr(module: Module, W: Parameter) -> Change:
    """kron(w1, w2) * alpha / r, laid out as the parameter (arXiv:2212.10650); r is the config's."""
    import torch

    left = module["lokr_w1"] if "lokr_w1" in module else module["lokr_w1_a"] @ module["lokr_w1_b"]
    if "lokr_w2" in module:
        right = module["lokr_w2"]
    elif "lokr_t2" in module:
        right = torch.einsum("ijkl,ip,jr->prkl", *(module[f"lokr_{x}"] for x in ("t2", "w2_a", "w2_b")))
    else:
        right = module["lokr_w2_a"] @ module["lokr_w2_b"]
    if right.ndim == 4:
        left = left[:, :, None, None]
    scale = module.by_pattern("alpha_pattern", "alpha") / module.by_pattern("rank_pattern", "r")
    return dense(torch.kron(left, right.contiguous()).reshape(W.shape).mul_(scale))


def hira(module: Module, W: Parameter) -> Change:
    """W * (B @ A), elementwise (ICLR 2025, openreview TwJrTz9cRS); of embeddings (B @ A).T."""
    if "hira_A" in module:
        left, right = module["hira_B"].flatten(1), module["hira_A"].flatten(1)
    else:
        left, right = module["hira_embedding_A"].T, module["hira_embedding_B"].T
    return Change(lambda start, stop: W.rows(start, stop) * (left[start:stop] @ right))
