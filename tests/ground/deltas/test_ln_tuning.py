"""LN tuning against PEFT's own merge: the file's tensors, rounded once to the base's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig
from safetensors.torch import load_file
from torch import nn

from pipeline.ground.deltas.ln_tuning import KIND
from tests.ground.deltas.claims import (
    DTYPES,
    WEIGHTS,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    wide_rows,
)
from tests.ground.deltas.parity import merged_by_peft, merged_by_us

LAYERS = lambda: nn.Sequential(nn.LayerNorm(7), nn.RMSNorm(5), nn.Linear(5, 3), nn.Linear(3, 3))  # noqa: E731


def config() -> LNTuningConfig:
    return LNTuningConfig(target_modules=["0", "1", "2"])


def test_keys_on_disk_name_the_layers_parameters(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS, config())
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / WEIGHTS)}
    told = {(0, "weight"), (0, "bias"), (1, "weight"), (2, "weight"), (2, "bias")}
    assert names == {f"{module}.ln_tuning_layers.{parameter}" for module, parameter in told}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_pefts(tmp_path: Path, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), dtype)
    assert found.different == []
    assert found.unmoved == ["3.weight", "3.bias"]


def test_float32_values_are_rounded_once_to_the_base(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    base = model(LAYERS, torch.bfloat16).state_dict()
    theirs = merged_by_peft(model(LAYERS, torch.bfloat16), tmp_path)
    ours = merged_by_us(base, found.deltas)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_are_the_files_in_any_cut(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    for delta in found.deltas:
        W = found.base[f"{delta.module}.{delta.parameter}"]
        assert torch.equal(
            wide_rows(delta, W), found.adapter(f"{delta.module}.ln_tuning_layers.{delta.parameter}")
        )
        assert does_not_depend_on_cuts(delta, W)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS, config())
    assert refusal(tmp_path, KIND, drop=["0.ln_tuning_layers.weight"]) == (
        "'0' has ln_tuning_layers.bias but no ln_tuning_layers.weight"
    )
    odd = {"0.ln_tuning_layers.weight": torch.ones(7, dtype=torch.int8)}
    assert refusal(tmp_path, KIND, tensors=odd).startswith("'0' holds I8 values")
