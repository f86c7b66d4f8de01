"""MiSS against PEFT's own merge: the same sums and one rounding on both sides, so equal bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import MissConfig
from torch import nn

from pipeline.ground.deltas.miss import KIND
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, turns, wide_rows
from tests.tolerance import FLOAT64_SLACK

LAYERS: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
    nn.Linear(24, 12), nn.Linear(36, 16, bias=False)
)
CASES: dict[str, dict[str, object]] = {
    "whole_groups": {"r": 4},
    "a_rest": {"r": 5},
    "random": {"r": 7, "init_weights": False},
    "mini": {"r": 5, "init_weights": "mini", "mini_r": 4},
    "bat": {"r": 4, "init_weights": "bat"},
}


def config(case: str) -> MissConfig:
    return MissConfig(target_modules=["0", "1"], **CASES[case])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(case), dtype)
    assert found.different == []
    assert found.unmoved == ["0.bias"]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_formula_in_float64(tmp_path: Path, case: str) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(case))
    for delta in found.deltas:
        weight, B = found.base[f"{delta.module}.weight"], found.adapter(f"{delta.module}.miss_block")
        exact, r = weight.double(), int(B.shape[-1] if case == "bat" else B.shape[0])
        if case == "bat":
            for i in range(0, weight.shape[0], r):
                for j in range(0, weight.shape[1], r):
                    X = exact[i : i + r, j : j + r].clone()
                    exact[i : i + r, j : j + r] = X + X @ B[i // r] + B[i // r]
        else:
            exact = torch.zeros_like(exact)
            for i in range(weight.shape[0]):
                for j in range(weight.shape[1]):
                    exact[i, j] = B[j % r, i % B.shape[1]]
        assert delta.replaces == (case == "bat")
        assert float((wide_rows(delta, weight) - exact).abs().max()) <= FLOAT64_SLACK
        assert does_not_depend_on_cuts(delta, weight) and turns(delta, weight)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    plain = merges(tmp_path, KIND, LAYERS, config("a_rest")).deltas[0]
    assert plain.misfit((13, 24)) == "was made for a weight [12, -1]"
    assert plain.misfit((12, 4)) == "was made for at least 5 inputs and outputs in groups of 12"
    assert plain.misfit((12, 5)) is None
    assert refusal(tmp_path, KIND, r=4) == "'0' has miss_block [5, 12], 4 of 4 x out being 4"
    mini = merges(tmp_path, KIND, LAYERS, config("mini")).deltas[0]
    assert mini.misfit((10, 24)) == "was made for at least 5 inputs and outputs in groups of 4"
    assert mini.misfit((8, 24)) is None
    assert refusal(tmp_path, KIND, mini_r=3) == "'0' has miss_block [5, 4], 3 of 5 x 3 being 3"
    bat = merges(tmp_path, KIND, LAYERS, config("bat")).deltas[0]
    assert bat.grain == 4
    assert bat.misfit((12, 26)) == "was made for inputs in groups of 4"
    assert bat.misfit((16, 24)) == "was made for a weight [12, -1]"
    assert refusal(tmp_path, KIND, init_weights=True) == "'0' has miss_block [3, 4, 4], which is not 4 x out"
    assert KIND.wrong({"r": None, "init_weights": "mini"}) == [
        "r is None, not a whole number above 0",
        "mini_r is None, not a whole number above 0",
    ]
    assert KIND.wrong({"r": 4, "init_weights": "bone"}) == [
        "init_weights is 'bone'; MiSS has true, false, 'bat' and 'mini'"
    ]
