"""IA3 against PEFT's own merge: one product and one rounding on both sides, so equal bits everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.delta import UNKNOWN
from pipeline.ground.deltas.ia3 import KIND
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, turns, wide_rows
from tests.ground.deltas.parity import merged_by_us

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 9, (1, 2))),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 9, 3, groups=3)),
    "conv3d": lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv3d(3, 5, 2)),
    "conv1d": lambda: nn.Sequential(Conv1D(13, 11), Conv1D(7, 13)),
}


def config(feedforward: list[str] | str) -> IA3Config:
    return IA3Config(target_modules=["0", "1"], feedforward_modules=feedforward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_with_their_bias_and_inputs_are_scaled_as_peft_does(
    tmp_path: Path, layer: str, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(["1"]), dtype, turned=layer == "conv1d")
    assert found.different == []
    assert found.unmoved == ["1.bias"]
    assert [(d.module, d.parameter) for d in found.deltas] == [
        ("0", "weight"),
        ("0", "bias"),
        ("1", "weight"),
    ]


def test_rows_are_the_formula_in_float64(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["grouped"], config("1"))
    outputs, bias, inputs = found.deltas
    W, b, V = (found.base[name].double() for name in ("0.weight", "0.bias", "1.weight"))
    one, two = found.adapter("0.ia3_l").flatten(), found.adapter("1.ia3_l").flatten()
    by_group = torch.stack(
        [two[i // 3 * 2 : i // 3 * 2 + 2] for i in range(9)]
    )  # 3 outputs, 2 inputs a group
    assert torch.equal(wide_rows(outputs, found.base["0.weight"]), W * one[:, None, None, None])
    assert torch.equal(wide_rows(bias, found.base["0.bias"]), b * one)
    assert torch.equal(wide_rows(inputs, found.base["1.weight"]), V * by_group[:, :, None, None])


@pytest.mark.parametrize("layer", ["linear", "grouped"])
def test_rows_do_not_depend_on_cuts(tmp_path: Path, layer: str) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(["1"]))
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.{delta.parameter}"]
        assert does_not_depend_on_cuts(delta, weight)
        assert len(weight.shape) != 2 or turns(delta, weight)


def test_a_layer_without_bias_has_none_to_scale(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, lambda: nn.Sequential(nn.Linear(5, 3, bias=False)), config([]))
    assert [delta.optional for delta in found.deltas] == [False, True]
    assert found.different == []


def test_a_vector_of_one_means_what_the_config_says(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), config(["1"]))
    assert [delta.shape for delta in found.deltas] == [(1, UNKNOWN), (1,), (UNKNOWN, 1)]
    assert found.different == []


def test_kernels_and_layers_fit_only_their_own_vectors(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["conv2d"], config(["1"]))
    outputs, bias, inputs = found.deltas
    assert outputs.misfit((6, 2, 1, 1)) is None
    assert inputs.misfit((9, 2, 3, 3)) is None  # three groups
    told = "was made for a weight "
    assert outputs.misfit((5, 4, 3, 3)) == f"{told}[6, -1, -1, -1]"
    assert inputs.misfit((10, 2, 3, 3)) == f"{told}[-1, 6, -1, -1]"  # ten outputs in three groups
    assert outputs.misfit((6, 4)) == f"{told}[6, -1, -1, -1]"
    assert bias.misfit((7,)) == f"{told}[6]"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS["linear"], config(["1"]))
    assert refusal(tmp_path, KIND, feedforward_modules=[]) == (
        "'1' has ia3_l [1, 13], but feedforward_modules lacks it"
    )
    assert refusal(tmp_path, KIND, feedforward_modules=["0", "1"]) == (
        "'0' has ia3_l [13, 1], but feedforward_modules lists it"
    )
    assert re.match("feedforward_modules '\\('.*regular", refusal(tmp_path, KIND, feedforward_modules="("))
    odd = {"0.ia3_l": torch.ones(13, 2)}
    assert refusal(tmp_path, KIND, tensors=odd, feedforward_modules=["1"]) == (
        "'0' has ia3_l [13, 2], which is no vector over outputs or inputs"
    )
    odd = {"0.ia3_l": torch.ones(13, 1, dtype=torch.int32)}
    assert "holds I32 values" in refusal(tmp_path, KIND, tensors=odd)
    assert KIND.wrong({"feedforward_modules": None}) == [
        "feedforward_modules is None, neither a list of names nor a pattern"
    ]
    assert KIND.wrong({"feedforward_modules": ["down_proj"]}) == []


def test_a_feedforward_name_ends_the_path_as_text(tmp_path: Path) -> None:
    """PEFT matches by the last letters, not by whole names: "0" means "10" too."""
    layers = lambda: nn.Sequential(*(nn.Linear(5, 5) for _ in range(11)))  # noqa: E731
    chosen = IA3Config(target_modules=["0", "10"], feedforward_modules=["0"])
    found = merges(tmp_path, KIND, layers, chosen)
    assert [delta.shape for delta in found.deltas] == [(UNKNOWN, 5)] * 2
    assert merged_by_us(found.base, found.deltas).keys() == found.theirs.keys()
    assert found.different == []
