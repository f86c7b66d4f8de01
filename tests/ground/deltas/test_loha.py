"""LoHa against PEFT's own merge: the same products and one rounding, so equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoHaConfig
from torch import nn

from pipeline.ground.deltas.loha import KIND
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, wide_rows
from tests.ground.deltas.parity import WHOLE
from tests.tolerance import FLOAT64_SLACK

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 9, (1, 2))),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv1d(8, 9, 1)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(9, 9, 3, groups=3)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 9, 2)),
}


def config(effective: bool = False, **patterns: object) -> LoHaConfig:
    return LoHaConfig(r=3, alpha=7, target_modules=["0", "1"], use_effective_conv2d=effective, **patterns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_pefts(tmp_path: Path, layer: str, effective: bool, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(effective), dtype, block=WHOLE)
    assert found.different == []
    assert found.unmoved == ["0.bias", "1.bias"]


@pytest.mark.parametrize("effective", [False, True])
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, effective: bool) -> None:
    found = merges(tmp_path, KIND, LAYERS["conv2d"], config(effective))
    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]
        part = lambda name, module=delta.module: found.adapter(f"{module}.hada_{name}")  # noqa: E731
        pairs = [(part(f"w{n}_a"), part(f"w{n}_b")) for n in "12"]
        if effective:
            cores = part("t1"), part("t2")
            one, two = (
                torch.einsum("ijkl,io,jc->ockl", t, *pair) for t, pair in zip(cores, pairs, strict=True)
            )
        else:
            one, two = ((a @ b).view(W.shape) for a, b in pairs)
        exact = one * two * (7 / 3)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_patterns_reach_rank_and_alpha(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"^0": 2}, "alpha_pattern": {"1": 5}}
    found = merges(tmp_path, KIND, LAYERS["linear"], config(**patterns), block=WHOLE)
    told = [delta.describe(1) for delta in found.deltas]
    assert told == ["LoHa rank 2 scale 3.5", "LoHa rank 3 scale 1.66667"]
    assert found.different == []


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS["conv2d"], config(effective=True))
    assert refusal(tmp_path, KIND, rank_pattern={"1": 4}) == "'1' has rank 3, but the config says 4"
    assert refusal(tmp_path, KIND, tensors={"1.hada_w2_a": torch.ones(3, 8)}) == (
        "'1' has hada_w2_a [3, 8], out of r x out being 9"
    )
    assert refusal(tmp_path, KIND, tensors={"0.hada_t2": torch.ones(3, 3, 3)}) == (
        "'0' has hada_t2 [3, 3, 3], which is not r x r x k x l"
    )
    assert refusal(tmp_path, KIND, drop=["0.hada_t1"]) == (
        "'0' has hada_t2, hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b but no hada_t1"
    )
    assert refusal(tmp_path, KIND, drop=["0.hada_w2_b"]).endswith("but no hada_w2_b")
    assert KIND.wrong({"r": 3, "alpha": float("inf"), "alpha_pattern": {"0": None}}) == [
        "alpha is inf, not a finite number",
        "alpha_pattern is {'0': None}, not a table of patterns and numbers",
    ]


def test_a_kernel_of_another_size_does_not_fit(tmp_path: Path) -> None:
    kernel = merges(tmp_path, KIND, LAYERS["conv2d"], config(effective=True)).deltas[0]
    assert kernel.misfit((8, 4, 3, 3)) is None
    assert kernel.misfit((8, 4, 3, 2)) == "was made for a weight [8, 36]"
