"""GraLoRA against PEFT's own merge.

PEFT multiplies with zeros in between, we block by block, and both round once: equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import GraloraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.gralora import KIND
from tests.ground.deltas.claims import (
    DTYPES,
    Merges,
    does_not_depend_on_cuts,
    merges,
    refusal,
    turns,
    wide_rows,
)
from tests.ground.deltas.parity import NAMES, WHOLE
from tests.tolerance import FLOAT64_SLACK, within_half_ulp

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(24, 12), nn.Linear(36, 28, bias=False)),
    "conv1d": lambda: nn.Sequential(Conv1D(12, 24), Conv1D(28, 36)),
}


def config(k: int = 4, hybrid_r: int = 0) -> GraloraConfig:
    return GraloraConfig(target_modules=["0", "1"], r=8, gralora_k=k, alpha=13, hybrid_r=hybrid_r)


def formula(found: Merges, module: str, hybrid_r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(delta, the sum of its terms' sizes) in float64, one rank of one block after another."""
    A, B = found.adapter(f"{module}.gralora_A"), found.adapter(f"{module}.gralora_B")
    k, inputs, r = A.shape
    outputs, share, scale = B.shape[2], r // k, 13 / (r + hybrid_r)
    D = torch.zeros(2, outputs * k, inputs * k, dtype=torch.float64)
    for p in range(k):
        for q in range(k):
            block = D[:, p * outputs : (p + 1) * outputs, q * inputs : (q + 1) * inputs]
            for i in range(share):
                term = torch.outer(B[p, q * share + i], A[q, :, p * share + i]) * scale
                block += torch.stack([term, term.abs()])
    if hybrid_r:
        a, b = (found.adapter(f"{module}.gralora_{x}_general.weight") for x in "AB")
        D += torch.stack([b @ a, b.abs() @ a.abs()]) * scale
    return D[0], D[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_merge_is_pefts(tmp_path: Path, layer: str, hybrid_r: int, dtype: torch.dtype) -> None:
    turned = layer == "conv1d"
    found = merges(tmp_path, KIND, LAYERS[layer], config(hybrid_r=hybrid_r), dtype, turned, WHOLE)
    assert "0.weight" not in found.unmoved and "1.weight" not in found.unmoved
    assert found.different == []
    for module in "01":
        name = f"{module}.weight"
        D, size = formula(found, module, hybrid_r)
        D, size = (D.T, size.T) if turned else (D, size)
        W = found.base[name].double()
        assert within_half_ulp(found.ours[name], W + D, NAMES[dtype], W.abs() + size)
        assert within_half_ulp(found.theirs[name], W + D, NAMES[dtype], W.abs() + size)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_rows_are_the_formula_in_float64(tmp_path: Path, k: int, hybrid_r: int) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(k, hybrid_r))
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        D, size = formula(found, delta.module, hybrid_r)
        assert bool(((wide_rows(delta, weight) - D).abs() <= FLOAT64_SLACK * size).all())
        assert does_not_depend_on_cuts(delta, weight) and turns(delta, weight)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(hybrid_r=3))
    assert found.deltas[0].misfit((12, 28)) == "was made for a weight [12, 24]"
    assert refusal(tmp_path, KIND, hybrid_r=0) == (
        "'0' has gralora_A_general or gralora_B_general, but the config's hybrid_r is 0"
    )
    assert refusal(tmp_path, KIND, hybrid_r=2) == (
        "'0' has gralora_A_general.weight [3, 24], 2 of 2 x 24 being 2"
    )
    assert refusal(tmp_path, KIND, hybrid_r=3, gralora_k=2).startswith("'0' has gralora_A [4, 6, 8]")
    assert refusal(tmp_path, KIND, gralora_k=4, drop=["B_general.weight"]) == (
        "'0' has gralora_A, gralora_A_general.weight, gralora_B but no gralora_B_general.weight"
    )
    fields = {"r": 8, "gralora_k": 3, "hybrid_r": 0, "alpha": 64}
    assert KIND.wrong(fields) == ["r is 8, which gralora_k, 3, does not divide"]
    assert KIND.wrong({**fields, "gralora_k": 4}) == []
    assert KIND.wrong({**fields, "hybrid_r": -1, "alpha": None}) == [
        "hybrid_r is -1, not a whole number above 0",
        "alpha is None, not a finite number",
    ]
