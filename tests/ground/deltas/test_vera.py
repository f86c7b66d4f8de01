"""VeRA against PEFT's own merge: equal bits, with saved projections and with drawn ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas import projection
from pipeline.ground.deltas.vera import KIND, Vera
from tests.ground.deltas.claims import (
    CONFIG,
    DTYPES,
    WEIGHTS,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    wide_rows,
)
from tests.ground.deltas.parity import WHOLE, deltas, merged_by_peft, merged_by_us
from tests.tolerance import FLOAT64_SLACK

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7), nn.Linear(17, 3)),
    "conv1d": lambda: nn.Sequential(Conv1D(13, 11), Conv1D(7, 13), Conv1D(3, 17)),
}


def config(**fields: Any) -> VeraConfig:
    return VeraConfig(**{"r": 4, "target_modules": ["0", "1", "2"], **fields})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_pefts(tmp_path: Path, layer: str, saved: bool, dtype: torch.dtype) -> None:
    """A drawn projection is rounded to the base's dtype on both sides: PEFT creates it in that."""
    chosen = config(save_projection=saved, projection_prng_key=7)
    found = merges(tmp_path, KIND, LAYERS[layer], chosen, dtype, turned=layer == "conv1d", block=WHOLE)
    assert ("base_model.vera_A" in load_file(tmp_path / WEIGHTS)) == saved
    assert found.different == []
    assert found.unmoved == ["0.bias", "1.bias", "2.bias"]


@pytest.mark.parametrize("key", [0, 7, 2**40])
def test_the_drawn_projection_is_pefts_bit_for_bit(tmp_path: Path, key: int) -> None:
    merges(tmp_path, KIND, LAYERS["linear"], config(save_projection=False, projection_prng_key=key))
    loaded = PeftModel.from_pretrained(model(LAYERS["linear"]), str(tmp_path)).base_model
    A, B = projection.vera(key, 4, (13, 17))
    assert torch.equal(A, loaded.vera_A["default"])
    assert torch.equal(B, loaded.vera_B["default"])


@pytest.mark.parametrize("saved", [True, False])
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, saved: bool) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(save_projection=saved))
    A, B = (x.double() for x in projection.vera(0, 4, (13, 17)))
    placed = [delta.on(tuple(found.base[f"{delta.module}.weight"].shape)) for delta in found.deltas]
    for delta in (delta.among(placed) for delta in placed):
        W = found.base[f"{delta.module}.weight"]
        b, d = (found.adapter(f"{delta.module}.vera_lambda_{letter}") for letter in "bd")
        outputs, inputs = W.shape
        exact = torch.diag(b) @ B[:outputs] @ torch.diag(d) @ A[:, :inputs]
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_a_projection_in_the_file_counts_though_the_config_does_not_expect_it(tmp_path: Path) -> None:
    """PEFT draws one all the same, with a warning; it is the same one, rounded to the base's dtype."""
    found = merges(tmp_path, KIND, LAYERS["linear"], config())
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "save_projection": False}))
    assert all(isinstance(delta, Vera) and delta.saved for delta in deltas(tmp_path, KIND))
    theirs = merged_by_peft(model(LAYERS["linear"]), tmp_path)
    assert all(torch.equal(found.ours[name], theirs[name]) for name in theirs)


def test_a_drawn_projection_is_as_large_as_the_largest_of_all_modules(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(save_projection=False))
    alone = merged_by_us(found.base, found.deltas[:1])
    assert not torch.equal(alone["0.weight"], found.theirs["0.weight"])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config())
    assert found.deltas[0].misfit((13, 18)) == "shares a vera_A of 17 columns, fewer than the weight's 18"
    assert found.deltas[0].misfit((13, 11, 1, 1)) == "was made for a matrix"
    assert found.deltas[0].misfit((12, 11)) == "was made for a weight [13, -1]"
    assert refusal(tmp_path, KIND, r=5) == "'0' has vera_lambda_d [4], 5 of 5 being 5"
    assert refusal(tmp_path, KIND, tensors={"0.vera_lambda_b": torch.ones(20)}, r=4) == (
        "'0' has 20 outputs, r is 4: vera_A [4, 17] and vera_B [13, 4] do not cover that"
    )
    assert refusal(tmp_path, KIND, drop=["0.vera_lambda_b"]) == "'0' has vera_lambda_d but no vera_lambda_b"
    stored = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in stored.items() if k != "base_model.vera_B"}, tmp_path / WEIGHTS)
    drop = ["0.vera_lambda_d"]
    assert refusal(tmp_path, KIND, drop=drop) == "'1' needs vera_B, which the file does not hold"
    assert KIND.wrong({"r": 4, "projection_prng_key": None, "save_projection": 1}) == [
        "save_projection is 1, neither true nor false",
        "projection_prng_key is None, not a seed, so what it drew cannot be drawn again",
    ]
