"""The best rank-r approximation of a matrix, U diag(S) Vt, by the cheapest way that is exact enough.

Gram and eigh of the smaller side for small matrices and high ranks; block Krylov for low ranks of large
ones (Musco and Musco 2015, arXiv:1504.05477; arXiv:2508.06486), stopped once the energy it captures no
longer grows; a full SVD where that is asked for. The product of the factors is always D projected onto
orthonormal vectors, in float32, so that what they capture is S^2 exactly, however near those are to the best
ones. So the search for them may be coarser: Krylov's products are taken in bfloat16 on CPUs that multiply it
twice as fast, which moves vectors among nearly equal singular values and costs 1e-6 of the energy.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.device import multiplies_bfloat16
from pipeline.ground.scratch import Scratch

if TYPE_CHECKING:
    from torch import Tensor

_OVERSAMPLING = 8
_LANES = 16  # columns that kernels multiply at once: a block of 48 takes no longer than one of 40
_SMALL = 512  # of the smaller side: below it eigh costs next to nothing, and its Gram matrix is float64
_KRYLOV_SHARE = 16  # Krylov where the rank is at most this part of the smaller side
_MOST_BLOCKS = 16
_ENOUGH = 2.5e-4  # of the captured energy: what further blocks may still have added
_SLOWEST = 0.5  # the fall that is reckoned with where early gains are of a few large values, and tell nothing
_STEADY = 4  # blocks after which the last two falls tell the pace
_NOTHING = 1e-4  # of the captured energy: after a gain so small even a slow fall (0.8) leaves less than 5e-4


class Method(Enum):
    """How singular vectors are found."""

    auto = "auto"
    gram = "gram"
    krylov = "krylov"
    exact = "exact"


class LowRank(NamedTuple):
    """U (m, r) with orthonormal columns, S (r) falling, SVt (r, n) with rows of length S."""

    U: Tensor
    S: Tensor
    SVt: Tensor

    def first(self, rank: int) -> LowRank:
        """Its leading part."""
        return LowRank(self.U[:, :rank], self.S[:rank], self.SVt[:rank])

    @property
    def energy(self) -> float:
        """||U U.T D||^2: what of ||D||^2 it captures."""
        return float(self.S.double().square().sum())


def low_rank(
    D: Tensor, rank: int, seed: int = 0, method: Method = Method.auto, scratch: Scratch | None = None
) -> LowRank:
    """The leading `rank` singular triples of a float32 matrix (m, n), on its own device."""
    rank, scratch = min(rank, *D.shape), scratch or Scratch()
    if chosen(D.shape[0], D.shape[1], rank, method) is Method.exact:
        import torch

        U, S, Vt = torch.linalg.svd(D, full_matrices=False)
        return LowRank(U[:, :rank], S[:rank], S[:rank, None] * Vt[:rank])
    if D.shape[0] <= D.shape[1]:
        return _projected(_left_vectors(D, rank, seed, method, scratch), D)
    # Of a tall matrix the right vectors are cheaper: D = (D V) V.T, and D V = U S after one QR more.
    return _turned(_projected(_left_vectors(D.T, rank, seed, method, scratch), D.T))


def chosen(m: int, n: int, rank: int, method: Method = Method.auto) -> Method:
    """The method that `auto` means for a matrix of this size."""
    if method is not Method.auto:
        return method
    smaller = min(m, n)
    low = smaller > _SMALL and rank * _KRYLOV_SHARE <= smaller
    return Method.krylov if low else Method.gram


def _left_vectors(D: Tensor, rank: int, seed: int, method: Method, scratch: Scratch) -> Tensor:
    way = chosen(D.shape[0], D.shape[1], rank, method)
    return _krylov(D, rank, seed, scratch) if way is Method.krylov else _gram(D, rank)


def _projected(U: Tensor, D: Tensor) -> LowRank:
    """The triples whose left vectors span U: exact in what U captures, with S and order as D has them."""
    import torch

    P = U.T @ D
    values, Y = torch.linalg.eigh((P @ P.T).double())
    order = values.argsort(descending=True)
    Y = Y[:, order].to(D.dtype)
    return LowRank(U @ Y, values[order].clamp_min(0).sqrt().to(D.dtype), Y.T @ P)


def _turned(low: LowRank) -> LowRank:
    """Of D.T, the same of D."""
    import torch

    US, V = low.SVt.T, low.U  # D = US @ V.T, the columns of US orthogonal up to rounding
    U, R = torch.linalg.qr(US)
    return LowRank(*_diagonal(U, R, V.T))


def _diagonal(U: Tensor, R: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    left, S, right = torch.linalg.svd(R.double())
    return U @ left.to(U.dtype), S.to(U.dtype), (S[:, None] * right).to(U.dtype) @ Vt


def _gram(D: Tensor, rank: int) -> Tensor:
    import torch

    G = D.double() @ D.double().T if D.shape[0] <= _SMALL else D @ D.T
    return torch.linalg.eigh(G)[1][:, -rank:].to(D.dtype)


def _krylov(D: Tensor, rank: int, seed: int, scratch: Scratch) -> Tensor:
    """(m, rank): the best left vectors within the span of D O, D D.T D O, ... for a random block O."""
    import torch

    m, n = D.shape
    width = min(-(-(rank + _OVERSAMPLING) // _LANES) * _LANES, m)
    random = torch.Generator().manual_seed(seed)
    coarse = _coarse(D, scratch) if multiplies_bfloat16(str(D.device)) else D

    def times(matrix: Tensor, block: Tensor) -> Tensor:
        return (matrix @ block.to(matrix.dtype)).to(D.dtype)

    Q = _orthonormal(times(coarse, torch.randn(n, width, generator=random).to(D)))
    K, W = Q, times(coarse.T, Q)  # W = D.T K
    C = (W.T @ W).double()  # whose eigenvalues are the energies that K captures
    captured, gains = 0.0, [float("inf")]
    while True:
        values, Y = torch.linalg.eigh(C)
        now = float(values[-rank:].sum())
        gains.append(now - captured)
        captured = now
        if _settled(gains, captured):
            return _orthonormal(K @ Y[:, -rank:].to(D.dtype))
        if K.shape[1] + width > m or K.shape[1] >= _MOST_BLOCKS * width:
            return _gram(D, rank)
        block = times(coarse, W[:, -width:])
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            block = block - K @ (K.T @ block)
        Q = _orthonormal(block)
        Q = _orthonormal(Q - K @ (K.T @ Q))
        more = times(coarse.T, Q)
        cross, K, W = (W.T @ more).double(), torch.cat((K, Q), 1), torch.cat((W, more), 1)
        C = torch.cat(
            (torch.cat((C, cross), 1), torch.cat((cross.T, (more.T @ more).double()), 1)),
        )


def _coarse(D: Tensor, scratch: Scratch) -> Tensor:
    """The matrix in bfloat16, as its values lie in memory."""
    import torch

    flat = D if D.is_contiguous() else D.T
    coarse = scratch.empty("coarse", tuple(flat.shape), torch.bfloat16, D.device).copy_(flat)
    return coarse if flat is D else coarse.T


def _settled(gains: list[float], captured: float) -> bool:
    """Whether what is still to come, if gains go on falling as slowly as they lately did, is too little."""
    last, before = gains[-1], gains[-2]
    if last <= captured * _NOTHING:
        return True
    steady = len(gains) > _STEADY
    ratio = max(last / before, before / gains[-3]) if steady else max(last / before, _SLOWEST)
    return ratio < 1 and last * ratio / (1 - ratio) <= _ENOUGH * captured


def _orthonormal(block: Tensor) -> Tensor:
    import torch

    return torch.linalg.qr(block)[0]
