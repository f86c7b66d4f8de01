"""The figures of two models' predictions, against numpy and the formulas written out; and over stretches."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from pipeline.ground.divergence import Positions, compared, figures, positions
from pipeline.ground.texts import sample
from tests.tolerance import FLOAT32_KL, FLOAT64_SUM

COUNT, CLASSES = 300, 13


def predictions() -> list[torch.Tensor]:
    """Log-probabilities of adapter, base and merged model, the last near the first."""
    torch.manual_seed(0)
    one = torch.randn(COUNT, CLASSES)
    others = one + 0.8 * torch.randn(COUNT, CLASSES), one + 0.05 * torch.randn(COUNT, CLASSES)
    return [values.log_softmax(-1) for values in (one, *others)]


@pytest.fixture(scope="module")
def following() -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(CLASSES, (COUNT,))
    tokens[::17] = -1
    return tokens


def test_divergences_and_shares_are_numpys(following: torch.Tensor) -> None:
    p, b, q = predictions()
    found = compared(p, b, q, following)
    P, B, Q = (v.double().numpy() for v in (p, b, q))
    off = (np.exp(P) * (P - Q)).sum(-1)
    effect = (np.exp(P) * (P - B)).sum(-1)
    for name, value in {
        "kl_mean": off.mean(),
        "kl_error": off.std(ddof=1) / sqrt(COUNT),
        "kl_median": np.median(off),
        "kl_p99": np.quantile(off, 0.99),
        "kl_p999": np.quantile(off, 0.999),
        "kl_max": off.max(),
        "kl_adapter_base": effect.mean(),
        "kl_adapter_base_error": effect.std(ddof=1) / sqrt(COUNT),
        "ratio": off.mean() / effect.mean(),
    }.items():
        assert found[name] == pytest.approx(value, rel=FLOAT32_KL * 100), name
    same = (P.argmax(-1) == Q.argmax(-1)).mean()
    assert 0.5 < same < 1
    assert found["top1_agreement"] == same
    assert found["top1_error"] == pytest.approx(sqrt(same * (1 - same) / (COUNT - 1)))


def test_the_error_of_the_ratio_is_that_of_a_ratio_of_means(following: torch.Tensor) -> None:
    """The delta method (Cochran, Sampling Techniques, 2.11), which knows nothing of resampling."""
    p, b, q = predictions()
    found = compared(p, b, q, following)
    P, B, Q = (v.double().numpy() for v in (p, b, q))
    off, effect = ((np.exp(P) * (P - X)).sum(-1) for X in (Q, B))
    ratio = off.mean() / effect.mean()
    error = np.std(off - ratio * effect, ddof=1) / sqrt(COUNT) / effect.mean()
    assert found["ratio_error"] == pytest.approx(error, rel=0.1)  # 1000 resamples
    low, high = found["ratio_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_figures_of_the_text_are_numpys(following: torch.Tensor) -> None:
    p, b, q = predictions()
    found = compared(p, b, q, following)
    rows = np.flatnonzero(following.numpy() >= 0)
    ours, theirs, plain = (v.double().numpy()[rows, following.numpy()[rows]] for v in (p, q, b))
    for who, values in (("adapter", ours), ("merged", theirs), ("base", plain)):
        perplexity = exp(-values.mean())
        assert found[f"perplexity_{who}"] == pytest.approx(perplexity, rel=FLOAT64_SUM)
        error = perplexity * values.std(ddof=1) / sqrt(len(rows))
        assert found[f"perplexity_{who}_error"] == pytest.approx(error, rel=FLOAT64_SUM)
    assert log(found["perplexity_ratio"]) == pytest.approx((ours - theirs).mean(), rel=FLOAT64_SUM)
    error = found["perplexity_ratio"] * (ours - theirs).std(ddof=1) / sqrt(len(rows))
    assert found["perplexity_ratio_error"] == pytest.approx(error, rel=FLOAT64_SUM)
    assert found["log_perplexity_correlation"] == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    moved = np.exp(theirs) - np.exp(ours)
    rms = sqrt((moved**2).mean())
    assert found["rms_probability"] == pytest.approx(rms, rel=FLOAT64_SUM)
    assert found["rms_error"] == pytest.approx((moved**2).std(ddof=1) / sqrt(len(rows)) / (2 * rms))
    told = found["probability_change"]
    assert told["mean"] == pytest.approx(moved.mean(), rel=FLOAT64_SUM)
    for name, share in (("min", 0), ("p1", 0.01), ("p5", 0.05), ("median", 0.5), ("p99", 0.99), ("max", 1)):
        assert told[name] == pytest.approx(np.quantile(moved, share), rel=FLOAT64_SUM), name


def test_stretches_of_text_give_the_figures_of_the_whole(following: torch.Tensor) -> None:
    p, b, q = predictions()
    cuts = [slice(0, 100), slice(100, 111), slice(111, COUNT)]
    parts = [positions(p[c], b[c], q[c], following[c]) for c in cuts]
    assert figures(Positions.together(parts)) == compared(p, b, q, following)


def test_without_following_tokens_there_are_no_perplexities() -> None:
    assert "perplexity_ratio" not in compared(*predictions())


def test_models_that_say_the_same_give_no_divergence_and_no_error(following: torch.Tensor) -> None:
    p, b, _ = predictions()
    found = compared(p, b, p, following)
    assert (found["kl_mean"], found["ratio"], found["rms_probability"], found["rms_error"]) == (0, 0, 0, 0)
    assert found["log_perplexity_correlation"] == pytest.approx(1)


def test_ten_thousand_tokens_of_text_are_there_the_page_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    few, many = sample(300), sample(10_240)
    assert few.startswith("The library opens at nine")
    assert many.startswith(few)
    assert len(many.split()) > 10_240
    monkeypatch.setattr(pydoc_data.topics, "topics", {})
    assert sample(10_240) == few
