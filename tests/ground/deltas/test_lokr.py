"""LoKr against PEFT's own merge: the same products and one rounding, so equal bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from safetensors.torch import load_file
from torch import nn

from pipeline.ground.deltas.lokr import KIND
from tests.ground.deltas.claims import (
    DTYPES,
    WEIGHTS,
    does_not_depend_on_cuts,
    merges,
    refusal,
    wide_rows,
)
from tests.ground.deltas.parity import WHOLE
from tests.tolerance import FLOAT64_SLACK

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 9, (1, 2))),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(4, 12, 1), nn.Conv1d(12, 9, 1)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 9, 3, groups=3)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(4, 12, 3), nn.Conv1d(12, 10, 2)),
}
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"r": 20},
    "right factored": {"r": 1},
    "both factored": {"r": 1, "decompose_both": True},
    "by four": {"r": 2, "decompose_factor": 4},
}


def config(**fields: Any) -> LoKrConfig:
    return LoKrConfig(**{"r": 2, "alpha": 7, "target_modules": ["0", "1"], **fields})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_pefts(tmp_path: Path, layer: str, form: str, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(**FORMS[form]), dtype, block=WHOLE)
    assert found.different == []
    assert found.unmoved == ["0.bias", "1.bias"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["conv2d", "conv1d"])
def test_bits_of_the_effective_form_are_pefts(tmp_path: Path, layer: str, dtype: torch.dtype) -> None:
    kind = {"conv2d": nn.Conv2d, "conv1d": nn.Conv1d}[layer]
    chosen = config(use_effective_conv2d=True, target_modules=["0"])
    found = merges(tmp_path, KIND, lambda: nn.Sequential(kind(36, 49, 3)), chosen, dtype, block=WHOLE)
    assert "base_model.model.0.lokr_t2" in load_file(tmp_path / WEIGHTS)
    assert found.different == []


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, form: str, effective: bool) -> None:
    fields = {**FORMS[form], "use_effective_conv2d": effective}
    found = merges(tmp_path, KIND, LAYERS["conv2d"], config(**fields))
    stored = load_file(tmp_path / WEIGHTS)
    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]

        def part(name: str, module: str = delta.module) -> torch.Tensor | None:
            value = stored.get(f"base_model.model.{module}.lokr_{name}")
            return None if value is None else value.double()

        a, b, t2 = part("w2_a"), part("w2_b"), part("t2")
        w1, w2 = part("w1"), part("w2")
        if w1 is None:
            w1 = part("w1_a") @ part("w1_b")
        if w2 is None:
            w2 = a @ b if t2 is None else torch.einsum("ijkl,ib,jd->bdkl", t2, a, b)
        exact = (torch.kron(w1, w2.flatten(1)) * (7 / fields["r"])).view(W.shape)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_a_whole_right_side_of_one_dimension_lies_as_peft_trained_it(tmp_path: Path) -> None:
    """PEFT's kron there is of (1, a, c) and (b, d, k): not the Kronecker product by channels, but it is what
    its forward pass used."""
    found = merges(tmp_path, KIND, LAYERS["conv1d"], config(r=20))
    w1, w2 = found.adapter("0.lokr_w1"), found.adapter("0.lokr_w2")
    assert w2.ndim == 3
    exact = torch.kron(w1[None], w2).reshape(12, 4, 3) * (7 / 20)
    assert torch.equal(wide_rows(found.deltas[0], found.base["0.weight"]), exact)
    assert not torch.equal(exact, (torch.kron(w1[:, :, None], w2) * (7 / 20)))
    assert does_not_depend_on_cuts(found.deltas[0], found.base["0.weight"])


def test_patterns_reach_rank_and_alpha(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"0": 1}, "alpha_pattern": {"1": 5}}
    found = merges(tmp_path, KIND, LAYERS["linear"], config(r=20, **patterns))
    assert [delta.describe(1) for delta in found.deltas] == ["LoKr scale 7", "LoKr scale 0.25"]
    assert found.different == []


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS["conv2d"], config(r=1))
    assert refusal(tmp_path, KIND, r=2) == "'0' has rank 1, but the config says 2"
    assert refusal(tmp_path, KIND, tensors={"0.lokr_w1_a": torch.ones(3, 1)}) == (
        "'0' has both lokr_w1 and its factors"
    )
    assert refusal(tmp_path, KIND, drop=["0.lokr_w1", "0.lokr_w1_a"]).endswith("but no lokr_w1_a")
    odd = {"0.lokr_w1": torch.ones(3, 2, 1)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has lokr_w1 [3, 2, 1], which is not a x c"
    odd = {"0.lokr_w1": torch.ones(3, 2), "0.lokr_t2": torch.ones(1, 1, 3, 3)}
    assert refusal(tmp_path, KIND, tensors=odd).startswith("'0' has lokr_w2_b ")
    odd = {"0.lokr_w2": torch.ones(4, 2, 3, 3)}
    assert (
        refusal(tmp_path, KIND, drop=["0.lokr_w2_a", "0.lokr_w2_b"], tensors=odd)
        == "'0' has both lokr_w2 and lokr_t2"
    )
    assert KIND.wrong({"r": True, "alpha": 1, "rank_pattern": [4]}) == [
        "r is True, not a whole number above 0",
        "rank_pattern is [4], not a table of patterns and numbers",
    ]
