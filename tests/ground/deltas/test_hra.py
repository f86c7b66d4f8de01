"""HRA against PEFT's own merge.

PEFT multiplies the reflections out in float32 and the weight by their product, rounded once; we apply them to
the rows as one low-rank change. Both are off by float32 sums, and agree in bits nearly always once rounded
to 16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import HRAConfig
from torch import nn

from pipeline.ground.deltas.hra import KIND, reflections
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, turns, wide_rows
from tests.ground.deltas.parity import NAMES
from tests.tolerance import FLOAT64_SLACK, num_different, within_half_ulp

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(23, 13), nn.Linear(36, 7, bias=False)),
    "kernels": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 2)),
}


def config(orthogonal: bool, r: int = 5) -> HRAConfig:
    return HRAConfig(target_modules=["0", "1"], r=r, apply_GS=orthogonal, init_weights=False)


def product(u: torch.Tensor, orthogonal: bool) -> torch.Tensor:
    """The dense product of reflections, float64."""
    if orthogonal:
        u = torch.linalg.qr(u).Q
    dense = torch.eye(len(u), dtype=torch.float64)
    for column in u.T:
        dense = dense @ (torch.eye(len(u)) - 2 * torch.outer(column, column) / (column @ column))
    return dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_merge_is_the_reflections_rounded_once_and_so_is_pefts(
    tmp_path: Path, layer: str, orthogonal: bool, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(orthogonal), dtype)
    assert [name for name in found.unmoved if "weight" in name] == []
    for delta in found.deltas:
        name = f"{delta.module}.weight"
        W, u = found.base[name].flatten(1).double(), found.adapter(f"{delta.module}.hra_u")
        exact = W @ product(u, orthogonal)
        left, right = (part.abs() for part in reflections(u.clone(), orthogonal))
        size = W.abs() + W.abs() @ left @ right
        ours, theirs = found.ours[name].flatten(1), found.theirs[name].flatten(1)
        assert within_half_ulp(ours, exact, NAMES[dtype], size)
        assert within_half_ulp(theirs, exact, NAMES[dtype], size)
        if dtype != torch.float32:
            assert num_different(ours, theirs) <= ours.numel() / 50
        wide = wide_rows(delta, found.base[name]).flatten(1)
        assert bool(((wide - exact).abs() <= FLOAT64_SLACK * size).all())


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_do_not_depend_on_cuts(tmp_path: Path, layer: str) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(False))
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        assert does_not_depend_on_cuts(delta, weight)
        assert len(weight.shape) != 2 or turns(delta, weight)


def test_pairs_of_equal_planes_change_nothing() -> None:
    """PEFT begins with such pairs; the accumulated product stands that."""
    u = torch.randn(40, 8, dtype=torch.float64).repeat_interleave(2, 1)
    left, right = reflections(u, orthogonal=False)
    assert float((left @ right).abs().max()) <= FLOAT64_SLACK * float(left.abs().sum(1).max())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(False))
    assert found.deltas[0].misfit((13, 24)) == "was made for a weight [-1, 23]"
    assert refusal(tmp_path, KIND, r=4) == "'0' has 5 reflections, but the config's r is 4"
    odd = {"0.hra_u": torch.zeros(23, 5, 1)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has hra_u [23, 5, 1], which is not in x r"
    assert KIND.wrong({"r": 0, "apply_GS": "yes"}) == [
        "r is 0, not a whole number above 0",
        "apply_GS is 'yes', neither true nor false",
    ]
