"""The part of the page on layers and probes."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.ground import charts
from pipeline.ground.html_layers import layers_section

pytestmark = pytest.mark.draws


def probed(outerr: float) -> dict[str, Any]:
    interval = [0.9 * outerr, 1.1 * outerr]
    aligned = {"aligned_outerr": outerr, "aligned_outerr_interval": interval}
    return {**aligned, "aligned_outerr_of_rounding": outerr / 2, "random_outerr": 4 * outerr}


def test_the_worst_stand_first_with_what_rounding_alone_costs() -> None:
    weights = {f"model.layers.{n}.self_attn.q_proj.weight": probed(0.01 * (n + 1)) for n in range(12)}
    page = layers_section({**weights, "lm_head.weight": {"retained": 1.0}})
    assert page is not None
    assert page.count("<svg") == 1
    assert page.index("layers.11.self") < page.index("layers.10.self")
    assert "layers.1.self" not in page  # ten are listed
    for shown in ("0.12", "0.108 to 0.132", "0.06", "0.48"):
        assert f">{shown}<" in page


def test_a_cell_shows_the_worst_of_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(charts, "heat_map", lambda *given, **_: seen.append(given) or "<svg></svg>")
    layers_section({f"model.layers.0.mlp.experts.{n}.up_proj.weight": probed(0.1 * n) for n in (2, 3, 1)})
    assert seen[0][2] == [[pytest.approx(0.3)]]


def test_without_a_lora_random_inputs_are_shown_and_without_probes_nothing() -> None:
    page = layers_section({"a.0.w.weight": {"random_outerr": 0.25}})
    assert page is not None
    assert "on random inputs" in page
    assert layers_section({"a.0.w.weight": {"retained": 1.0}}) is None
