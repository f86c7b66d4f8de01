"""Low rank by outputs: the optimum of a float64 computation that shares no code with ours, and its worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.ground.calibration import Moments
from pipeline.ground.errors import PipelineError
from pipeline.ground.lowrank import Method, low_rank
from pipeline.ground.whitening import Inputs, Seen, projected, put_aside, turned
from tests.tolerance import FLOAT32_SUM, NO_DIRECTION


def spectrum(m: int, n: int, power: float, seed: int = 0) -> torch.Tensor:
    """A random matrix with the singular values i^-power."""
    random = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=random))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=random))[0]
    return U * torch.arange(1, k + 1) ** -power @ V.T


def root(n: int, power: float) -> torch.Tensor:
    """(n, n): what turns white inputs into ones whose second moments have the eigenvalues i^-power."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(7)))[0]
    return Q * torch.arange(1, n + 1) ** (-power / 2)


def inputs_of(path: Path, X: torch.Tensor, held: torch.Tensor, shrinkage: float = 0.01) -> Inputs:
    moments = Moments(torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64))
    moments.add(X)
    moments.hold_out(held, 1)
    found = put_aside(path, moments, shrinkage)
    assert found
    return found


def extracted(
    D: torch.Tensor, inputs: Inputs, rank: int, method: Method = Method.auto
) -> tuple[torch.Tensor, Seen]:
    """D_r, and what is said of it."""
    whitened = inputs.whitened(D)
    low = low_rank(whitened, rank, method=method)
    plain = low_rank(D, rank, method=method)
    made, seen = projected(D, low, float(whitened.square().sum()), plain, inputs.held_out())
    return made.U @ made.SVt, seen


def optimum(D: torch.Tensor, X: torch.Tensor, shrinkage: float, rank: int) -> tuple[np.ndarray, float]:
    """min ||(D - D_r) C^(1/2)|| by numpy in float64, by a symmetric root and its inverse."""
    x, d = X.double().numpy(), D.double().numpy()
    C = x.T @ x / len(x)
    mean = np.mean(np.diag(C))
    values, Q = np.linalg.eigh(C / mean + shrinkage * np.eye(len(C)))
    half = Q * np.sqrt(values) @ Q.T
    U, S, Vt = np.linalg.svd(d @ half, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vt[:rank] @ np.linalg.inv(half)
    return half, float(np.linalg.norm((d - best) @ half))


@pytest.mark.parametrize("method", [Method.gram, Method.krylov, Method.exact])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
def test_no_matrix_of_this_rank_is_nearer_in_outputs(
    tmp_path: Path, shape: tuple[int, int], method: Method
) -> None:
    m, n = shape
    D, A = spectrum(m, n, 0.3), root(n, 1.2)
    X = torch.randn(1000, n, generator=torch.Generator().manual_seed(1)) @ A.T
    inputs = inputs_of(tmp_path / "L", X[:800], X[800:])
    for rank in (1, 5, 20):
        half, best = optimum(D, X[:800], 0.01, rank)
        made, seen = extracted(D, inputs, rank, method)
        found = np.linalg.norm((D.double() - made.double()).numpy() @ half)
        assert found <= best * (1 + FLOAT32_SUM)
        total = np.linalg.norm(D.double().numpy() @ half)
        assert abs(seen.captured(rank) - (1 - best**2 / total**2)) < FLOAT32_SUM
        assert torch.linalg.matrix_rank(made, rtol=NO_DIRECTION) == rank


def test_shares_of_inputs_held_out_are_what_both_ways_keep_of_them(tmp_path: Path) -> None:
    D, A = spectrum(60, 48, 0.3), root(48, 1.2)
    X = torch.randn(700, 48, generator=torch.Generator().manual_seed(1)) @ A.T
    fitted, held = X[:600], X[600:]
    inputs = inputs_of(tmp_path / "L", fitted, held)
    for rank in (3, 11):
        made, seen = extracted(D, inputs, rank)
        U, S, Vt = torch.linalg.svd(D.double())
        plain = U[:, :rank] * S[:rank] @ Vt[:rank]
        energy = ((D @ held.T).double() ** 2).sum()
        for said, D_r in ((seen.held, made.double()), (seen.held_plain, plain)):
            missed = (((D.double() - D_r) @ held.double().T) ** 2).sum()
            assert abs(sum(said) / seen.held_energy - float(1 - missed / energy)) < FLOAT32_SUM


@pytest.mark.parametrize(("samples", "wanted"), [(8192, 0.519), (1024, 0.528)])
def test_strongly_directed_inputs_gain_as_much_as_was_measured(
    tmp_path: Path, samples: int, wanted: float
) -> None:
    # spec/fidelity.md section 6: 768 x 1024, D ~ i^-.3, inputs ~ i^-1.2, rank 32: .884 -> .519
    D, A = spectrum(768, 1024, 0.3), root(1024, 1.2)
    X = torch.randn(samples, 1024, generator=torch.Generator().manual_seed(1)) @ A.T
    made, _ = extracted(D, inputs_of(tmp_path / "L", X, X[:8]), 32)
    low = low_rank(D, 32)
    error, plain = (float(((D - D_r) @ A).norm() / (D @ A).norm()) for D_r in (made, low.U @ low.SVt))
    assert abs(plain - 0.884) < 0.03  # a few directions hold most of it: one draw is not the other
    assert abs(error - wanted) < 0.03
    in_weights = [float((D - D_r).norm() / D.norm()) for D_r in (low.U @ low.SVt, made)]
    assert in_weights[0] < in_weights[1]  # which is the price


def test_fewer_samples_than_features_do_harm_which_is_why_they_are_refused(tmp_path: Path) -> None:
    D, A = spectrum(384, 512, 0.3), root(512, 0.5)
    X = torch.randn(4096, 512, generator=torch.Generator().manual_seed(1)) @ A.T
    low = low_rank(D, 16)
    plain = float(((D - low.U @ low.SVt) @ A).norm())
    few, enough = (
        float(((D - extracted(D, inputs_of(tmp_path / "L", X[:count], X[:8]), 16)[0]) @ A).norm())
        for count in (128, 4096)
    )
    assert enough < plain < few


def test_a_few_huge_directions_leave_a_factor_that_is_exact(tmp_path: Path) -> None:
    # Massive activations: two features thousands of times larger than all others, and always together.
    X = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    X[::50, 5] += 3000
    X[::50, 9] -= 3000
    inputs = inputs_of(tmp_path / "L", X, X[:8])
    L = inputs.whitened(torch.eye(64)).double()
    C = (X.double().T @ X.double()) / len(X)
    C = C / C.diagonal().mean() + 0.01 * torch.eye(64)
    scale = C.diagonal().sqrt()
    assert bool(((L @ L.T - C).abs() < FLOAT32_SUM * scale[:, None] * scale).all())


def test_a_matrix_whose_rows_are_inputs_is_the_same_turned(tmp_path: Path) -> None:
    D, A = spectrum(40, 30, 0.3), root(30, 1.2)
    X = torch.randn(300, 30, generator=torch.Generator().manual_seed(1)) @ A.T
    inputs = inputs_of(tmp_path / "L", X, X[:50])
    whitened = inputs.whitened(D)
    low, _ = projected(D, low_rank(whitened, 4), 1.0, low_rank(D, 4), inputs.held_out())
    back = turned(low)
    made = back.U @ back.SVt
    assert float((made.T - low.U @ low.SVt).abs().max()) < FLOAT32_SUM * float(D.abs().max())
    assert torch.allclose(back.U.norm(dim=0), torch.ones(4))


def test_inputs_that_are_nothing_have_no_factor_and_infinite_ones_are_refused(tmp_path: Path) -> None:
    nothing = Moments(torch.zeros(4, 4, dtype=torch.float64))
    nothing.hold_out(torch.zeros(2, 4), 1)
    assert put_aside(tmp_path / "L", nothing, 0.01) is None
    X = torch.ones(8, 4)
    X[3, 2] = float("inf")
    with pytest.raises(PipelineError, match="not finite"):
        inputs_of(tmp_path / "L", X, X)
