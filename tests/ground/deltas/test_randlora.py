"""RandLoRA against PEFT's own merge: equal bits for float32 bases, and for others with safe_merge.

Without safe_merge PEFT rounds the delta to the base's dtype before it adds it; the last test of bits
does the same and finds PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas import projection
from pipeline.ground.deltas.randlora import KIND
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
    "linear": lambda: nn.Sequential(nn.Linear(11, 14), nn.Linear(14, 7), nn.Linear(9, 9)),
    "conv1d": lambda: nn.Sequential(Conv1D(14, 11), Conv1D(7, 14), Conv1D(9, 9)),
}
BASES: dict[str, dict[str, Any]] = {
    "saved": {},
    "drawn": {"save_projection": False, "projection_prng_key": 7},
    "sparse": {"save_projection": False, "sparse": True},
    "very sparse": {"save_projection": False, "very_sparse": True, "sparse": True},
}


def config(**fields: Any) -> RandLoraConfig:
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 7, "target_modules": ["0", "1", "2"], **fields})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bases", BASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_those_of_pefts_safe_merge(
    tmp_path: Path, layer: str, bases: str, dtype: torch.dtype
) -> None:
    found = merges(
        tmp_path, KIND, LAYERS[layer], config(**BASES[bases]), dtype, turned=layer == "conv1d", block=WHOLE
    )
    theirs = merged_by_peft(model(LAYERS[layer], dtype), tmp_path, safe_merge=True)
    assert all(torch.equal(found.ours[name], theirs[name]) for name in theirs)
    assert found.unmoved == ["0.bias", "1.bias", "2.bias"]
    assert bool(found.different) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_pefts_other_merge_adds_is_rounded_before(tmp_path: Path, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(), dtype, block=WHOLE)
    nothing = {name: torch.zeros_like(weight) for name, weight in found.base.items()}
    added = merged_by_us(nothing, found.deltas, block=WHOLE)
    assert all(torch.equal(found.base[name] + added[name], found.theirs[name]) for name in found.theirs)


@pytest.mark.parametrize("bases", BASES)
def test_the_drawn_bases_are_pefts_bit_for_bit(tmp_path: Path, bases: str) -> None:
    merges(tmp_path, KIND, LAYERS["linear"], config(**BASES[bases]))
    loaded = PeftModel.from_pretrained(model(LAYERS["linear"]), str(tmp_path)).base_model
    sparsity = {"sparse": "sparse", "very sparse": "very_sparse"}.get(bases)
    A, B = projection.randlora(7 if bases == "drawn" else 0, 3, (14, 14), sparsity)
    assert torch.equal(A.float(), loaded.randlora_A["default"])
    assert torch.equal(B.float(), loaded.randlora_B["default"])


@pytest.mark.parametrize("bases", BASES)
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, bases: str) -> None:
    """The sum over bases j of B_j diag(lambda_j) A diag(gamma_j), each row of A under the lambda and gamma
    that PEFT's flattening pairs with its column of B."""
    found = merges(tmp_path, KIND, LAYERS["linear"], config(**BASES[bases]))
    sparsity = {"sparse": "sparse", "very sparse": "very_sparse"}.get(bases)
    A, B = (x.double() for x in projection.randlora(7 if bases == "drawn" else 0, 3, (14, 14), sparsity))
    placed = [delta.on(tuple(found.base[f"{delta.module}.weight"].shape)) for delta in found.deltas]
    for delta in (delta.among(placed) for delta in placed):
        W = found.base[f"{delta.module}.weight"]
        lambdas, gamma = (found.adapter(f"{delta.module}.randlora_{name}") for name in ("lambda", "gamma"))
        n, least, most = len(gamma), min(W.shape), max(W.shape)
        exact = torch.zeros(most, least, dtype=torch.float64)
        for place in range(3 * n):
            row = lambdas[place // n, place % n] * A[place // n, 0, :least] * gamma[place % n]
            exact += torch.outer(B[:most, place // 3, place % 3], row)
        exact = (exact if W.shape[0] >= W.shape[1] else exact.T) * (7 / 3)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_copies_that_peft_writes_for_every_module_must_agree(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config())
    stored = load_file(tmp_path / WEIGHTS)
    assert {entry.name for delta in found.deltas for entry in delta.entries} == set(stored)
    stored["base_model.model.0.randlora_B"] = stored["base_model.model.0.randlora_B"] + 1
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(PipelineError, match=r"0\.randlora_B' differs from what all modules share"):
        merged_by_us(found.base, deltas(tmp_path, KIND))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config())
    assert found.deltas[0].misfit((11, 14)) is None  # no file tells which side is which
    assert found.deltas[0].misfit((14, 12)) == "was made for a weight whose smaller side is 11"
    assert found.deltas[0].misfit((15, 11)) == "shares a randlora_B for 14 features, fewer than 15"
    assert refusal(tmp_path, KIND, r=4) == "'0' has randlora_lambda [3, 4], 4 of 4 x n being 4"
    assert refusal(tmp_path, KIND, tensors={"0.randlora_gamma": torch.ones(4, 20)}, r=3) == (
        "'0' has 4 bases of rank 3 for 20 features"
    )
    odd = {"0.randlora_gamma": torch.ones(6, 16), "0.randlora_lambda": torch.ones(3, 6)}
    assert refusal(tmp_path, KIND, tensors=odd) == (
        "'0' needs 6 bases of rank 3 for 16 features: randlora_A [3, 1, 14] and randlora_B [14, 5, 3] "
        "do not cover that"
    )
    assert refusal(tmp_path, KIND, drop=["0.randlora_gamma"]).endswith("but no randlora_gamma")
    odd = {"0.randlora_gamma": torch.ones(4, 11), "0.randlora_lambda": torch.ones(3, 4)}
    assert refusal(tmp_path, KIND, drop=["base_model.randlora_A"], tensors=odd) == (
        "'0' needs randlora_A, which the file does not hold"
    )
    fields = {"r": 3, "randlora_alpha": None, "projection_prng_key": 2**64, "sparse": "yes"}
    assert [sentence.split(" is ")[0] for sentence in KIND.wrong(fields)] == [
        "randlora_alpha",
        "sparse",
        "projection_prng_key",
    ]
