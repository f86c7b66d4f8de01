"""HiRA against PEFT's own merge.

On a float32 base both are the same float32 products: equal bits for linear layers; transposed products and
convolutions take their sums in another order and end up to one place apart. On 16-bit bases PEFT rounds
B @ A, its product with W and the sum, we the sum alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.hira import KIND
from tests.ground.deltas.claims import (
    DTYPES,
    Merges,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    rewrite,
    wide_rows,
)
from tests.ground.deltas.parity import NAMES, WHOLE, deltas, write_adapter
from tests.tolerance import FLOAT64_SLACK, within_half_ulp, worst_ulp

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(23, 13), nn.Linear(36, 7, bias=False)),
    "embedding": lambda: nn.Sequential(nn.Embedding(17, 6), nn.Embedding(11, 9)),
    "conv1d": lambda: nn.Sequential(Conv1D(13, 23), Conv1D(7, 36)),
    "kernels_1d": lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 5, 1)),
    "kernels_2d": lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 3)), nn.Conv2d(6, 5, 1)),
    "kernels_3d": lambda: nn.Sequential(nn.Conv3d(4, 6, 2), nn.Conv3d(3, 5, (2, 1, 3))),
}


def config(**fields: object) -> HiraConfig:
    return HiraConfig(target_modules=["0", "1"], r=3, **fields)  # type: ignore[arg-type]


def factors(found: Merges, module: str, layer: str) -> torch.Tensor:
    """B @ A in float64, shaped as the weight."""
    kind = "hira_embedding" if layer == "embedding" else "hira"
    A, B = (found.adapter(f"{module}.{kind}_{x}") for x in "AB")
    BA = B.flatten(1) @ A.flatten(1)
    return (BA.T if layer in ("embedding", "conv1d") else BA).reshape(found.base[f"{module}.weight"].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_merge_is_the_formula_rounded_once_where_peft_rounds_three_times(
    tmp_path: Path, layer: str, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(), dtype, turned=layer == "conv1d", block=WHOLE)
    assert [name for name in found.unmoved if "weight" in name] == []
    for module in "01":
        name = f"{module}.weight"
        W, BA = found.base[name], factors(found, module, layer)
        exact = W.double() * (1 + BA)
        assert within_half_ulp(found.ours[name], exact, NAMES[dtype], W.double().abs() * (1 + BA.abs()))
        assert worst_ulp(found.ours[name], found.theirs[name].double(), NAMES[dtype]) <= 1
        if dtype != torch.float32:
            assert torch.equal(found.theirs[name], W + W * BA.to(dtype))
    if dtype == torch.float32 and layer == "linear":
        assert found.different == []


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_are_the_formula_in_float64(tmp_path: Path, layer: str) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(), turned=layer == "conv1d")
    for delta in found.deltas:
        delta = delta.turned() if layer == "conv1d" else delta
        weight = found.base[f"{delta.module}.weight"]
        exact = weight.double() * factors(found, delta.module, layer)
        assert bool(((wide_rows(delta, weight) - exact).abs() <= FLOAT64_SLACK * weight.abs()).all())
        assert does_not_depend_on_cuts(delta, weight)


def test_two_adapters_add_up_on_the_unmerged_base(tmp_path: Path) -> None:
    """So HiRA adds, though it depends on the base."""
    layers = LAYERS["linear"]
    one, two = merges(tmp_path / "one", KIND, layers, config()), tmp_path / "two"
    write_adapter(two, model(layers), config(), size=0.3)
    tuned = PeftModel.from_pretrained(model(layers), str(tmp_path / "one"))
    tuned.load_adapter(str(two), "two")
    theirs = tuned.merge_and_unload(adapter_names=["default", "two"]).state_dict()["0.weight"]
    first, second = (
        wide_rows(next(d for d in found if d.module == "0"), one.base["0.weight"])
        for found in (one.deltas, deltas(two, KIND))
    )
    W = one.base["0.weight"].double()
    size = W.abs() + first.abs() + second.abs()
    assert within_half_ulp(theirs, W + first + second, "F32", size)
    assert not within_half_ulp(theirs, (W + first) * (W + second) / W, "F32", size)


def test_rank_pattern_is_met_as_written_or_as_peft_ignores_it(tmp_path: Path) -> None:
    """PEFT 0.21 makes the layers of a first adapter with `r`, whatever rank_pattern says."""
    found = merges(tmp_path, KIND, LAYERS["linear"], config(rank_pattern={"1": 5}))
    assert [delta.rank for delta in found.deltas] == [3, 3]
    assert found.different == []
    rewrite(tmp_path, tensors={"1.hira_A": torch.zeros(5, 36), "1.hira_B": torch.zeros(7, 5)})
    assert sorted(delta.rank or 0 for delta in deltas(tmp_path, KIND)) == [3, 5]
    assert refusal(tmp_path, KIND, rank_pattern={"1": 4}) == "'1' has rank 5, but the config says 4"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["kernels_2d"], config())
    assert found.deltas[0].misfit((6, 2, 2, 3)) == "was made for a weight [6, 4, 2, 3]"
    odd = {"0.hira_B": torch.zeros(6, 3, 2, 1)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has hira_B [6, 3, 2, 1], 1 of out x r x 1 x 1 being 1"
    assert refusal(tmp_path, KIND, drop=["0.hira_B"]) == "'0' has hira_A but no hira_B"
    both = {"0.hira_B": torch.zeros(6, 3), "0.hira_embedding_A": torch.zeros(3, 4)}
    assert (
        refusal(tmp_path, KIND, tensors=both)
        == "'0' has hira_A, hira_B, hira_embedding_A but no hira_embedding_B"
    )
    both = {"0.hira_embedding_B": torch.zeros(6, 3)}
    assert refusal(tmp_path, KIND, tensors=both) == "'0' has the factors of a layer and of an embedding"
    assert KIND.wrong({"r": True}) == ["r is True, not a whole number above 0"]
