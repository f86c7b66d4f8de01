"""AdaLoRA against PEFT's own merge: the same product, scale and single rounding, so equal bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.adalora import KIND
from tests.ground.deltas.claims import (
    CONFIG,
    DTYPES,
    WEIGHTS,
    Merges,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    wide_rows,
)
from tests.ground.deltas.parity import WHOLE, deltas, merged_by_peft, merged_by_us
from tests.tolerance import FLOAT64_SLACK, within_half_ulp

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 9, (1, 2))),
    "conv1d": lambda: nn.Sequential(Conv1D(13, 11), Conv1D(7, 13)),
}
MASKS = {"0": [True, False, True, True, False], "1": [False] * 5}  # three triplets left, and none


def config(alpha: int = 8) -> AdaLoraConfig:
    return AdaLoraConfig(total_step=10, init_r=5, lora_alpha=alpha, target_modules=["0", "1"])


def pruned(folder: Path, dtype: torch.dtype = torch.float32, alpha: int = 8) -> Merges:
    """As training leaves it: singular values masked to zero, the masks in the config, PEFT's own save.

    `theirs` is what that model in memory merges to, before any file.
    """
    tuned = get_peft_model(model(LAYERS["linear"], dtype), config(alpha))
    torch.manual_seed(1)
    for name, mask in MASKS.items():
        layer = tuned.base_model.model.get_submodule(name)
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_E):
            parameter["default"].data.normal_()
        layer.lora_E["default"].data[~torch.tensor(mask)] = 0
    tuned.peft_config["default"].rank_pattern = {f"{n}.lora_E.default": m for n, m in MASKS.items()}
    tuned.save_pretrained(folder)
    tuned.peft_config["default"].rank_pattern = None
    base = {name: weight.clone() for name, weight in model(LAYERS["linear"], dtype).state_dict().items()}
    found = deltas(folder, KIND)
    theirs = tuned.merge_and_unload().state_dict()
    return Merges(base, found, merged_by_us(base, found, block=WHOLE), theirs, folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_pefts(tmp_path: Path, layer: str, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(), dtype, turned=layer == "conv1d", block=WHOLE)
    assert found.different == []
    assert found.unmoved == ["0.bias", "1.bias"]


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, layer: str) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config())
    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]
        A, B, E = (found.adapter(f"{delta.module}.lora_{letter}") for letter in "ABE")
        exact = (B @ torch.diag(E.flatten()) @ A * (8 / (5 + 1e-5))).view(W.shape)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_a_pruned_file_holds_the_triplets_left_and_config_their_masks(tmp_path: Path) -> None:
    pruned(tmp_path)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / WEIGHTS).items()}
    assert shapes["base_model.model.0.lora_A"] == (3, 11)
    assert shapes["base_model.model.1.lora_B"] == (7, 0)
    masks = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert masks == {f"{name}.lora_E": mask for name, mask in MASKS.items()}


def test_a_pruned_adapter_keeps_the_scale_of_its_first_rank(tmp_path: Path) -> None:
    found = pruned(tmp_path)
    assert [delta.rank for delta in found.deltas] == [3, 0]
    assert found.different == []
    assert merged_by_peft(model(LAYERS["linear"]), tmp_path).keys() == found.ours.keys()
    reloaded = merged_by_peft(model(LAYERS["linear"]), tmp_path)
    assert all(torch.equal(found.ours[name], reloaded[name]) for name in reloaded)


def test_peft_reloads_a_pruned_adapter_without_alpha_at_another_scale(tmp_path: Path) -> None:
    """alpha <= 0 means the rank: the first one in training, the pruned one after PEFT's load. We keep 5."""
    found = pruned(tmp_path, alpha=0)
    assert found.different == []
    reloaded = merged_by_peft(model(LAYERS["linear"]), tmp_path)["0.weight"]
    W, D = found.base["0.weight"], wide_rows(found.deltas[0], found.base["0.weight"])
    assert within_half_ulp(reloaded, W + D * 3 / 5, "F32", W.abs() + D.abs())


def test_peft_rounds_a_pruned_adapter_to_the_base_while_it_loads(tmp_path: Path) -> None:
    """It makes the smaller parameters anew, in the base's dtype; we take the file's float32 values."""
    found = pruned(tmp_path, torch.bfloat16)
    assert found.different == []
    loaded = PeftModel.from_pretrained(model(LAYERS["linear"], torch.bfloat16), str(tmp_path))
    A = loaded.base_model.model.get_submodule("0").lora_A["default"]
    assert torch.equal(A, found.adapter("0.lora_A").bfloat16().float())
    assert not torch.equal(A, found.adapter("0.lora_A", torch.float32))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path)
    masks = {f"{name}.lora_E": mask for name, mask in MASKS.items()}
    assert refusal(tmp_path, KIND, rank_pattern=None) == "'0' has rank 3, but the config leaves it 5 of 5"
    assert refusal(tmp_path, KIND, rank_pattern={**masks, "0.lora_E": [True] * 3}) == (
        "'0' has a mask of 3 in rank_pattern, but init_r is 5"
    )
    assert refusal(tmp_path, KIND, tensors={"0.lora_A": torch.ones(4, 11)}, rank_pattern=masks) == (
        "'0' has lora_B [13, 3], r of out x r being 4"
    )
    assert refusal(tmp_path, KIND, drop=["0.lora_E"]) == "'0' has lora_A, lora_B but no lora_E"


def test_fields_that_cannot_be_are_named() -> None:
    good = {"init_r": 5, "lora_alpha": 8, "rank_pattern": {"0.lora_E": [True]}}
    assert KIND.wrong(good) == []
    assert KIND.wrong({**good, "init_r": 0, "lora_alpha": "8", "rank_pattern": {"0": [1, 0]}}) == [
        "init_r is 0, not a whole number above 0",
        "lora_alpha is '8', not a finite number",
        "rank_pattern is {'0': [1, 0]}, not a table of names and lists of true and false",
    ]
