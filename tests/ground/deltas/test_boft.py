"""BOFT against PEFT's own merge.

Both compute W R^T s in float32 and round once. PEFT multiplies by whole matrices, we by their blocks: float32
sums of other order, so they agree up to the slack of such sums, and in bits nearly always once rounded
to 16. PEFT needs its CUDA extension for several factors; here torch stands in for what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from peft import BOFTConfig
from torch import nn

from pipeline.ground.deltas.boft import KIND
from tests.ground.deltas.claims import (
    DTYPES,
    Merges,
    does_not_depend_on_cuts,
    merges,
    refusal,
    turns,
    wide_rows,
)
from tests.ground.deltas.parity import NAMES
from tests.tolerance import FLOAT64_SLACK, num_different, within_half_ulp


class BlockDiagonal:
    """What boft/fbd/fbd_cuda_kernel.cu computes: (factors, blocks, n, n) to (factors, all, all)."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture(autouse=True)
def _extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", BlockDiagonal)


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(24, 13), nn.Linear(36, 7, bias=False)),
        {"boft_block_size": 3},
    ),
    "numbered": (
        lambda: nn.Sequential(nn.Linear(24, 13), nn.Linear(36, 7)),
        {"boft_block_size": 0, "boft_block_num": 6},
    ),
    "kernels": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(9, 8, 2)),
        {"boft_block_size": 6},
    ),
    "two_factors": (
        lambda: nn.Sequential(nn.Linear(24, 13), nn.Linear(40, 7)),
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    ),
    "three_factors": (
        lambda: nn.Sequential(nn.Linear(48, 13), nn.Linear(32, 7)),
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
    ),
    "four_factors_of_kernels": (
        lambda: nn.Sequential(nn.Conv2d(4, 5, 4), nn.Conv2d(16, 3, 2)),
        {"boft_block_size": 2, "boft_n_butterfly_factor": 4},
    ),
}


def config(layer: str) -> BOFTConfig:
    return BOFTConfig(target_modules=["0", "1"], **LAYERS[layer][1])


def factors(found: Merges, module: str) -> list[torch.Tensor]:
    """The dense factors in float64, the first one first."""
    R = found.adapter(f"{module}.boft_R")
    num_blocks, n = R.shape[1], R.shape[2]
    dense = []
    for level, blocks in enumerate(R):
        S = (blocks - blocks.mT) / 2
        eye = torch.eye(n, dtype=torch.float64)
        turned = torch.block_diag(*((eye - Q) @ torch.linalg.inv(eye + Q) for Q in S))
        P = torch.eye(num_blocks * n, dtype=torch.float64)
        if len(R) > 1:
            run, half, order = n * 2**level, n // 2, []
            for start in range(0, num_blocks * n, run):
                halves = [list(range(at, at + half)) for at in range(start, start + run, half)]
                order += [i for piece in (*halves[0::2], *halves[1::2]) for i in piece]
            P = P[order]
        dense.append(P @ turned @ P.T)
    return dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_merge_is_the_butterfly_rounded_once_and_so_is_pefts(
    tmp_path: Path, layer: str, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer][0], config(layer), dtype)
    assert [name for name in found.unmoved if "weight" in name] == []
    for delta in found.deltas:
        name = f"{delta.module}.weight"
        exact, size = found.base[name].flatten(1).double(), found.base[name].flatten(1).double().abs()
        for factor in factors(found, delta.module):
            exact, size = exact @ factor.T, size @ factor.abs().T
        s = found.adapter(f"{delta.module}.boft_s").view(-1, 1)
        exact, size = exact * s, size * s.abs()
        ours, theirs = found.ours[name].flatten(1), found.theirs[name].flatten(1)
        assert within_half_ulp(ours, exact, NAMES[dtype], size)
        assert within_half_ulp(theirs, exact, NAMES[dtype], size)
        if dtype != torch.float32:
            assert num_different(ours, theirs) <= ours.numel() / 100
        wide = wide_rows(delta, found.base[name]).flatten(1)
        assert bool(((wide - exact).abs() <= FLOAT64_SLACK * size).all())


@pytest.mark.parametrize("layer", ["kernels", "three_factors"])
def test_rows_do_not_depend_on_cuts(tmp_path: Path, layer: str) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer][0], config(layer))
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        assert does_not_depend_on_cuts(delta, weight)
        assert len(weight.shape) != 2 or turns(delta, weight)


def test_without_the_extension_peft_trains_one_factor_and_the_file_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
    found = merges(tmp_path, KIND, LAYERS["two_factors"][0], config("two_factors"), torch.bfloat16)
    assert [delta.describe(1.0) for delta in found.deltas] == ["BOFT 1 factors, blocks of 4"] * 2
    assert found.different == []


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["two_factors"][0], config("two_factors"))
    assert found.deltas[0].misfit((13, 28)) == "was made for a weight [13, 24]"
    assert refusal(tmp_path, KIND, boft_n_butterfly_factor=3) == (
        "'0' has 2 butterfly factors, but the config says 3"
    )
    assert refusal(tmp_path, KIND, boft_n_butterfly_factor=2, boft_block_size=6) == (
        "'0' has 6 blocks of 4, but boft_block_size 6"
    )
    odd = {"0.boft_R": torch.zeros(2, 5, 4, 4)}
    assert refusal(tmp_path, KIND, tensors=odd, boft_block_size=4) == (
        "'0' has 2 butterfly factors over 5 blocks of 4"
    )
    odd = {"0.boft_R": torch.zeros(2, 6, 4, 3)}
    assert refusal(tmp_path, KIND, tensors=odd) == (
        "'0' has boft_R [2, 6, 4, 3], size of factors x blocks x size x size being 4"
    )
    odd = {"0.boft_R": torch.zeros(2, 6, 4, 4), "0.boft_s": torch.zeros(13, 2)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has boft_s [13, 2], which is no vector over outputs"
    assert refusal(tmp_path, KIND, drop=["boft_s"]) == "'0' has boft_R but no boft_s"
    assert KIND.wrong({"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 0}) == [
        "boft_n_butterfly_factor is 0, not a whole number above 0"
    ]
