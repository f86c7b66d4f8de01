"""Limits on logits: judged by intervals, the ratio first; and the figures they are judged by."""

from __future__ import annotations

from math import exp, sqrt
from typing import Any

import pytest
import torch

from pipeline.ground.divergence import compared
from pipeline.ground.gates import EIGHT, FOUR, SIXTEEN, Limits, judge, limits_of, wilson
from pipeline.ground.report import Action, PlannedWeight, Status

SOUND: dict[str, Any] = {
    "finite": True,
    "ratio": 0.0015,
    "ratio_interval": [0.001, 0.002],
    "kl_adapter_base": 0.1,
    "kl_mean": 1e-5,
    "kl_interval": [0.9e-5, 1.1e-5],
    "kl_p999": 1e-3,
    "kl_p999_interval": [1e-3, 2e-3],
    "top1_agreement": 0.9956,
    "top1_interval": list(wilson(0.9956, 4096)),
    "rms_probability": 1e-3,
    "rms_interval": [1e-3, 2e-3],
}


def judged(asked: Limits | None = None, **changes: Any) -> tuple[dict[str, Status], list[str]]:
    gates, findings = judge({**SOUND, **changes}, SIXTEEN, asked or Limits(), "text")
    return {gate.name: gate.status for gate in gates}, findings


def test_a_share_that_may_as_well_be_right_is_not_refused() -> None:
    """99.3 % of 4,096 tokens is below 99.5 %, and its interval is not."""
    low, high = wilson(0.993, 4096)
    assert low < 0.995 < high
    asked = Limits(min_top1=0.995)
    assert judged(asked, top1_agreement=0.993, top1_interval=[low, high])[0]["same token"] is Status.passed
    worse = {"top1_agreement": 0.98, "top1_interval": list(wilson(0.98, 4096))}
    assert judged(asked, **worse)[0]["same token"] is Status.failed


def test_the_ratio_refuses_what_an_absolute_divergence_passes() -> None:
    gates, _ = judged(ratio_interval=[0.4, 0.5], kl_adapter_base=1e-5, kl_mean=5e-6, kl_interval=[4e-6, 6e-6])
    assert (gates["logits"], gates["divergence"]) == (Status.failed, Status.passed)


def test_what_is_lost_is_said_of_a_gate_that_passes_where_16_bits_would_not() -> None:
    def lost(low: float, ratio: float, asked: Limits, reported: bool) -> str:
        figures = {**SOUND, "ratio": ratio, "ratio_interval": [low, 2 * ratio]}
        (gate, *_), _ = judge(figures, FOUR, asked, "text", reported)
        return gate.lost

    said = "30 % of the adapter's effect is lost (KL ratio 0.3)"
    assert lost(0.2, 0.3, Limits(), False) == lost(0.2, 0.3, Limits(), True) == said
    assert lost(1.1, 1.3, Limits(), True) == "nothing of the adapter's effect is left (KL ratio 1.3)"
    assert lost(0.009, 0.012, Limits(), True) == ""  # it may as well be right
    assert lost(0.2, 0.3, Limits(max_ratio=0.1), False) == ""  # refused


def test_an_absolute_limit_that_nobody_set_is_told_and_refuses_nothing() -> None:
    off = {"kl_mean": 1e-3, "kl_interval": [9e-4, 2e-3]}
    gates, findings = judged(**off)
    assert Status.failed not in gates.values()
    assert findings == [
        "divergence: 0.001 (95 %: 0.0009 to 0.002), usually <= 0.0001 for weights of this width"
    ]
    assert judged(Limits(max_kl=1e-4), **off)[0]["divergence"] is Status.failed


def test_the_noise_of_the_evaluation_is_taken_away_before_judging() -> None:
    off = {"kl_mean": 1.5e-4, "kl_interval": [1.4e-4, 1.6e-4]}
    asked = Limits(max_kl=1e-4)
    assert judged(asked, **off)[0]["divergence"] is Status.failed
    assert judged(asked, **off, kl_floor=1e-4)[0]["divergence"] is Status.passed
    near = {"ratio_interval": [0.011, 0.012]}
    assert judged(**near)[0]["logits"] is Status.failed
    assert judged(**near, kl_floor=0.0002)[0]["logits"] is Status.passed


def test_a_faint_adapter_is_judged_by_the_divergence_itself() -> None:
    faint = {"ratio_interval": [0.1, 0.2], "kl_adapter_base": 1e-7}
    gates, findings = judged(**faint)
    assert gates["logits"] is Status.skipped
    assert "too little to judge" in findings[0]
    assert judged(**faint, kl_mean=1.0, kl_interval=[0.9, 1.1])[0]["divergence"] is Status.failed
    assert judged(ratio_interval=[0.6, 0.7], kl_adapter_base=1e-7)[0]["logits"] is Status.failed


def test_numbers_that_are_not_finite_are_refused() -> None:
    assert judged(finite=False)[0] == {"logits": Status.failed}


@pytest.mark.parametrize(("num_bytes", "limits"), [(400, SIXTEEN), (200, SIXTEEN), (104, EIGHT), (56, FOUR)])
def test_limits_go_by_the_bytes_of_an_element(num_bytes: int, limits: Limits) -> None:
    weight = PlannedWeight("w", (10, 10), "x", num_bytes, Action.merged, "BF16")
    assert limits_of([weight]) == limits
    assert Limits(max_kl=1.0).over(limits).max_kl == 1.0
    assert Limits(max_kl=1.0).over(limits).max_ratio == limits.max_ratio


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson(1.0, 10)[1] == 1.0


def test_probabilities_and_perplexities_are_those_of_the_tokens_that_follow() -> None:
    torch.manual_seed(0)
    p, b, q = (torch.randn(50, 7).log_softmax(-1) for _ in range(3))
    following = torch.randint(7, (50,))
    following[::10] = -1
    rows = [n for n in range(50) if following[n] >= 0]
    ours, theirs = ([float(v[n, following[n]]) for n in rows] for v in (p, q))
    found = compared(p, b, q, following)
    moved = [(exp(x) - exp(y)) ** 2 for x, y in zip(ours, theirs, strict=True)]
    assert found["rms_probability"] == pytest.approx(sqrt(sum(moved) / len(moved)))
    assert found["perplexity_adapter"] == pytest.approx(exp(-sum(ours) / len(ours)))
    assert found["perplexity_ratio"] == pytest.approx(
        found["perplexity_merged"] / found["perplexity_adapter"]
    )
    assert found["rms_interval"][0] < found["rms_probability"] < found["rms_interval"][1]
    assert found["kl_interval"][0] < found["kl_mean"] < found["kl_interval"][1]
    assert found["kl_median"] <= found["kl_p99"] <= found["kl_p999"] <= found["kl_max"]
    assert found["kl_p999_interval"][0] <= found["kl_p999"] <= found["kl_p999_interval"][1] + 1e-12
    assert "rms_probability" not in compared(p, b, q)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Means of exponential draws: the bootstrap's 95 % interval holds 1.0 in nearly all of 60 samples."""
    from pipeline.ground.divergence import interval_of, resampled

    torch.manual_seed(1)
    held = 0
    for _ in range(60):
        low, high = interval_of(resampled(torch.empty(1, 400, dtype=torch.float64).exponential_())[0])
        held += low < 1 < high
    assert held >= 51
