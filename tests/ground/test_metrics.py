"""The statistics of a merged weight, against the plain formulas in float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.ground import metrics
from pipeline.ground.metrics import Statistics, is_sampled, tile_facts
from tests.tolerance import FLOAT32_MEAN, FLOAT32_SUM


def gathered(W: torch.Tensor, D: torch.Tensor, rows: int) -> Statistics:
    O = (W.float() + D).to(W.dtype)  # noqa: E741
    starts = range(0, len(W), rows)
    facts = [
        tile_facts(
            O[s : s + rows], W[s : s + rows], W[s : s + rows], D[s : s + rows], is_sampled(i, len(starts))
        )
        for i, s in enumerate(starts)
    ]
    return Statistics.gathered(W.numel(), facts)


@pytest.mark.parametrize("relative", [1e-3, 3e-3, 3e-2])
def test_retained_and_norms_are_the_formulas(relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SAMPLED_ELEMENTS", 1 << 30)
    torch.manual_seed(0)
    W = (torch.randn(256, 384) * 0.02).to(torch.bfloat16)
    D = torch.randn(256, 384) * 0.02 * relative
    found = gathered(W, D, 64)
    O = (W.float() + D).to(torch.bfloat16).double()  # noqa: E741
    w, d = W.double(), D.double()
    assert found.sampled == W.numel()
    assert found.retained == pytest.approx(float(((O - w) * d).sum() / (d * d).sum()), rel=FLOAT32_SUM)
    assert found.changed_fraction == float((w != O).double().mean())
    assert found.relative_norm == pytest.approx(float(d.norm() / w.norm()), rel=FLOAT32_SUM)
    assert found.after["std"] == pytest.approx(float(O.std(correction=0)), rel=FLOAT32_SUM)
    assert (found.after["min"], found.after["max"]) == (float(O.min()), float(O.max()))
    assert found.before["mean"] == pytest.approx(float(w.mean()), abs=0.02 * FLOAT32_MEAN)


def test_nearest_rounding_keeps_what_is_known_of_small_deltas() -> None:
    """Measured on 2e6 entries elsewhere: at a relative norm of 1e-3 bfloat16 keeps 0.52, at 5e-3 0.99."""
    torch.manual_seed(0)
    W = (torch.randn(2048, 512) * 0.02).to(torch.bfloat16)
    for relative, kept in ((1e-3, 0.52), (5e-3, 0.99)):
        share = gathered(W, torch.randn(2048, 512) * 0.02 * relative, 512).retained
        assert share is not None
        assert abs(share - kept) < 0.03


def test_a_change_outside_the_sample_is_seen() -> None:
    W, D = torch.ones(4096, 64, dtype=torch.bfloat16), torch.zeros(4096, 64)
    assert not gathered(W, D, 8).changed
    D[100, 3] = 1.0
    found = gathered(W, D, 8)
    assert found.changed
    assert found.moved
    assert found.changed_fraction == 0.0  # of the sample
    D[100, 3] = torch.nan
    assert not gathered(W, D, 8).finite
    D[100, 3] = 1e-6
    assert gathered(W, D, 8).moved
    assert not gathered(W, D, 8).changed


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 100, 1001])
def test_the_sample_is_spread_and_bounded(tiles: int) -> None:
    taken = [i for i in range(tiles) if is_sampled(i, tiles)]
    assert taken[0] == 0
    assert min(tiles, metrics.SAMPLED_TILES) / 2 <= len(taken) <= metrics.SAMPLED_TILES
