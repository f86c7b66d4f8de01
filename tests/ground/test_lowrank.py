"""Low-rank approximation, held against a full SVD in float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.ground.lowrank import LowRank, Method, chosen, low_rank
from pipeline.ground.scratch import Scratch

M, N = 640, 900
NEAR_OPTIMAL = 0.9995  # of the energy that the full SVD's leading triples hold
INDEX = torch.arange(1, M + 1, dtype=torch.float64)


def _spikes(size: float, count: int, down_to: float) -> torch.Tensor:
    values = torch.linspace(1, 0.5, M, dtype=torch.float64)
    values[:count] = torch.linspace(size, down_to, count)
    return values


SPECTRA = {
    "i^-0.3": INDEX**-0.3,
    "i^-1": 1 / INDEX,
    "spikes on a bulk": _spikes(6, 24, 1.5),
    "few high spikes": _spikes(10, 4, 10),
    "a steep slope onto a bulk": _spikes(100, 4, 5),
    "more spikes than a block holds": _spikes(10, 60, 10),
    "exponential": (-INDEX / 40).exp(),
    "rank 16": (INDEX <= 16).double(),
    "flat": torch.ones(M, dtype=torch.float64),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(M, M, generator=random, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(N, M, generator=random, dtype=torch.float64))[0]
    return U, V


def captured(found: LowRank, D: torch.Tensor) -> float:
    """||D||^2 - ||D - U SVt||^2 in float64."""
    rest = D.double() - found.U.double() @ found.SVt.double()
    return float(D.double().square().sum() - rest.square().sum())


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("method", [Method.gram, Method.krylov])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_captures_what_the_best_one_does(bases, spectrum: str, method: Method, tall: bool) -> None:
    U, V = bases
    D = ((U * SPECTRA[spectrum]) @ V.T).float()
    D = D.T.contiguous() if tall else D
    for rank in (8, 40):
        found = low_rank(D, rank, method=method)
        best = float(SPECTRA[spectrum][:rank].square().sum())
        assert captured(found, D) >= NEAR_OPTIMAL * best
        assert abs(found.energy / captured(found, D) - 1) < 1 - NEAR_OPTIMAL
        assert bool((found.S[:-1] >= found.S[1:]).all())


def test_pure_noise_has_no_gap_and_is_captured_all_the_same() -> None:
    D = torch.randn(M, N, generator=torch.Generator().manual_seed(3))
    best = torch.linalg.svdvals(D.double())
    for rank in (4, 32):
        found = low_rank(D, rank, method=Method.krylov)
        assert captured(found, D) >= NEAR_OPTIMAL * float(best[:rank].square().sum())


@pytest.mark.parametrize("method", list(Method))
def test_left_vectors_are_orthonormal_even_beyond_the_rank(bases, method: Method) -> None:
    U, V = bases
    D = ((U * SPECTRA["rank 16"]) @ V.T).float()
    found = low_rank(D, 40, method=method)
    assert float((found.U.T @ found.U - torch.eye(40)).abs().max()) < 1e-5
    assert float(found.S[16:].max()) < 1e-3


@pytest.mark.parametrize("method", [Method.gram, Method.krylov])
def test_the_same_seed_gives_the_same_bits(bases, method: Method) -> None:
    U, V = bases
    D = ((U * SPECTRA["i^-1"]) @ V.T).float()
    one, two = low_rank(D, 8, 7, method), low_rank(D, 8, 7, method)
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.SVt, two.SVt)


def test_matrices_that_take_turns_in_memory_do_not_touch_each_others_factors(bases) -> None:
    U, V = bases
    first, second = (((U * SPECTRA[name]) @ V.T).float() for name in ("i^-1", "exponential"))
    shared = Scratch()
    found = [low_rank(D, 8, method=Method.krylov, scratch=shared) for D in (first, second.T, first)]
    for low, D in zip(found, (first, second.T, first), strict=True):
        alone = low_rank(D, 8, method=Method.krylov)
        assert torch.equal(low.U, alone.U)
        assert torch.equal(low.SVt, alone.SVt)


def test_a_zero_matrix_has_finite_factors() -> None:
    for shape in ((30, 50), (50, 30), (600, 700)):
        for method in (Method.gram, Method.krylov, Method.exact):
            found = low_rank(torch.zeros(shape), 4, method=method)
            assert bool(found.U.isfinite().all())
            assert float(found.SVt.abs().max()) == 0


def test_rank_is_no_more_than_the_matrix_has() -> None:
    assert low_rank(torch.randn(5, 9), 20).U.shape == (5, 5)
    assert low_rank(torch.randn(9, 1), 20).SVt.shape == (1, 1)


def test_method_follows_size() -> None:
    assert chosen(4096, 14336, 64) is Method.krylov
    assert chosen(4096, 14336, 1024) is Method.gram
    assert chosen(256, 100000, 4) is Method.gram
    assert chosen(4096, 4096, 64, Method.exact) is Method.exact
