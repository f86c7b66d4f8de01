"""C3A against PEFT's own merge, which finds the circulant blocks by a float32 FFT, rounds them to the base's
dtype and divides by the inputs in that: within these errors of it. Ours are the kernel's own values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig
from torch import nn

from pipeline.ground.deltas.c3a import KIND
from pipeline.ground.rounding import ulp
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, wide_rows
from tests.ground.deltas.parity import NAMES
from tests.tolerance import FLOAT32_FFT

LAYERS = lambda: nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 6), nn.Linear(6, 6))  # noqa: E731


def config(**fields: Any) -> C3AConfig:
    return C3AConfig(**{"block_size": 6, "target_modules": ["0", "1", "2"], **fields})


def circulant(kernel: torch.Tensor) -> torch.Tensor:
    """Each block's row p is its kernel rolled by p."""
    m, n, b = kernel.shape
    blocks = torch.stack([kernel.roll(p, dims=2) for p in range(b)], dim=1)  # (m, p, n, q)
    return blocks.reshape(m * b, n * b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_pefts_up_to_its_fft_and_roundings(tmp_path: Path, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), dtype)
    assert found.unmoved == ["0.bias", "1.bias", "2.bias"]
    for name in ("0.weight", "1.weight", "2.weight"):
        ours, theirs = found.ours[name].double(), found.theirs[name].double()
        kernel = found.adapter(f"{name[0]}.c3a_kernel")
        inputs, D = ours.shape[1], circulant(kernel)
        before = FLOAT32_FFT * D.abs().max() / inputs + ulp(D, NAMES[dtype]) / inputs
        after = ulp(D / inputs, NAMES[dtype]) + ulp(theirs, NAMES[dtype])
        assert ((ours - theirs).abs() <= before + after).all()


def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]
        exact = circulant(found.adapter(f"{delta.module}.c3a_kernel")) / W.shape[1]
        assert torch.equal(wide_rows(delta, W), exact)
        assert does_not_depend_on_cuts(delta, W)


def test_a_pattern_may_give_a_module_other_blocks(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(block_size_pattern={"1": 3}))
    assert [delta.describe(2) for delta in found.deltas] == [f"C3A block {b} times 2" for b in (6, 3, 6)]
    assert refusal(tmp_path, KIND, block_size_pattern={"1": 2}) == (
        "'1' has blocks of 3, but the config says 6 or 2"
    )


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    assert found.deltas[0].misfit((12, 18)) == "was made for a weight [18, 12]"
    odd = {"0.c3a_kernel": torch.ones(3, 12)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has c3a_kernel [3, 12], which is not m x n x b"
    assert KIND.wrong({"block_size": None, "block_size_pattern": {"a": 0}}) == [
        "block_size is None, not a whole number above 0",
        "block_size_pattern is {'a': 0}, not a table of patterns and numbers",
    ]
