"""VB-LoRA against PEFT's own merge: equal bits, from logits and from saved top-k weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.vblora import KIND
from pipeline.ground.errors import PipelineError
from tests.ground.deltas.claims import (
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
    "linear": lambda: nn.Sequential(nn.Linear(10, 15), nn.Linear(15, 5)),
    "conv1d": lambda: nn.Sequential(Conv1D(15, 10), Conv1D(5, 15)),
}
FORMS: dict[str, dict[str, Any]] = {
    "logits": {"num_vectors": 12},
    "top 2": {"num_vectors": 12, "save_only_topk_weights": True},
    "top 3 of many": {"num_vectors": 300, "topk": 3, "save_only_topk_weights": True},
    "top 1": {"num_vectors": 12, "topk": 1, "save_only_topk_weights": True},
}


def config(**fields: Any) -> VBLoRAConfig:
    return VBLoRAConfig(**{"r": 3, "vector_length": 5, "target_modules": ["0", "1"], **fields})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_pefts(tmp_path: Path, layer: str, form: str, dtype: torch.dtype) -> None:
    found = merges(
        tmp_path, KIND, LAYERS[layer], config(**FORMS[form]), dtype, turned=layer == "conv1d", block=WHOLE
    )
    assert found.different == []
    assert found.unmoved == ["0.bias", "1.bias"]


def test_logits_of_few_values_choose_the_same_vectors(tmp_path: Path) -> None:
    """Equal logits, as files in half precision have them, leave the choice to torch.topk on the CPU."""
    found = merges(tmp_path, KIND, LAYERS["linear"], config(num_vectors=12))
    stored = load_file(tmp_path / WEIGHTS)
    save_file({k: v.mul(4).round() if "logits" in k else v for k, v in stored.items()}, tmp_path / WEIGHTS)
    again = deltas(tmp_path, KIND)
    wide = merged_by_us(found.base, again, wide="F64")
    narrow = merged_by_us(found.base, again)
    assert all(torch.allclose(wide[n], narrow[n]) for n in wide)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, form: str) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(**FORMS[form]))
    stored = load_file(tmp_path / WEIGHTS)
    bank = stored["base_model.vblora_vector_bank"].double()

    def pieces(name: str) -> torch.Tensor:
        name = f"base_model.model.{name}"
        if form == "logits":
            best = stored[name].double().argsort(dim=-1, descending=True)[..., :2]
            weights = stored[name].double().gather(-1, best).softmax(-1)
        else:
            best, weights = stored[f"{name}_topk_indices"].long(), stored[f"{name}_topk_weights"].double()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        return torch.einsum("abk,abkl->abl", weights, bank[best])

    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]
        A, B = (pieces(f"{delta.module}.vblora_logits_{letter}") for letter in "AB")
        exact = torch.einsum("orl,rim->olim", B, A).reshape(W.shape)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_a_last_weight_that_rounds_below_zero_is_none(tmp_path: Path) -> None:
    """The first weights may sum to a little over 1; PEFT takes a logarithm of the rest then: NaN."""
    found = merges(tmp_path, KIND, LAYERS["linear"], config(**FORMS["top 2"]))
    stored = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.0.vblora_logits_A_topk_weights"
    stored[name] = torch.full_like(stored[name], 1 + 2**-23)
    save_file(stored, tmp_path / WEIGHTS)
    assert merged_by_us(found.base, deltas(tmp_path, KIND))["0.weight"].isfinite().all()
    assert merged_by_peft(model(LAYERS["linear"]), tmp_path)["0.weight"].isnan().any()


def test_an_index_beyond_the_bank_stops_the_run(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(**FORMS["top 2"]))
    stored = load_file(tmp_path / WEIGHTS)
    stored["base_model.model.0.vblora_logits_A_topk_indices"][0, 0, 0] = 12
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(PipelineError, match="names a vector outside the bank of 12"):
        merged_by_us(found.base, deltas(tmp_path, KIND))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS["linear"], config(**FORMS["top 2"]))
    assert refusal(tmp_path, KIND, save_only_topk_weights=False) == (
        "'0' has top-k tensors of vblora_logits_A, but save_only_topk_weights is not set"
    )
    assert refusal(tmp_path, KIND, save_only_topk_weights=True, topk=3) == (
        "'0' has vblora_logits_A_topk_indices [3, 2, 2], not .. x .. x 3"
    )
    assert refusal(tmp_path, KIND, topk=2, r=4) == "'0' has ranks 3 and 3, but the config says 4"
    assert refusal(tmp_path, KIND, r=3, vector_length=6) == (
        "'0' shares a vblora_vector_bank [12, 5], but the config says 12 vectors of length 6"
    )
    odd = {"0.vblora_logits_A_topk_indices": torch.zeros(3, 2, 2)}
    assert refusal(tmp_path, KIND, tensors=odd, vector_length=5) == (
        "'0' has vblora_logits_A_topk_indices of F32, not whole numbers"
    )
    odd = {"0.vblora_logits_A": torch.zeros(3, 2, 12)}
    assert refusal(tmp_path, KIND, tensors=odd).endswith("but save_only_topk_weights is set")
    drop = ["0.vblora_logits_A", "1.vblora_logits_B_topk_weights", "0.vblora_logits_A_topk_indices"]
    assert refusal(tmp_path, KIND, drop=drop).endswith("but no vblora_logits_A_topk_indices")
    good = {"r": 3, "num_vectors": 12, "vector_length": 5, "topk": 2}
    assert KIND.wrong(good) == []
    assert KIND.wrong({**good, "topk": 13}) == ["topk is 13, more than the 12 vectors there are"]
    assert KIND.wrong({**good, "r": 1.0}) == ["r is 1.0, not a whole number above 0"]
