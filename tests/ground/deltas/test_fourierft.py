"""FourierFT against PEFT's own merge: within what PEFT's float32 FFT of the whole matrix is off.

Ours is a sum in complex128, one row without the others, and equal to the float64 formula.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.ground.deltas.fourierft import KIND
from pipeline.ground.rounding import ulp
from tests.ground.deltas.claims import DTYPES, does_not_depend_on_cuts, merges, refusal, wide_rows
from tests.ground.deltas.parity import NAMES
from tests.tolerance import FLOAT32_FFT, FLOAT64_SLACK

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7), nn.Linear(16, 150)),
    "conv1d": lambda: nn.Sequential(Conv1D(13, 11), Conv1D(7, 13), Conv1D(150, 16)),
}


def config(**fields: Any) -> FourierFTConfig:
    return FourierFTConfig(**{"n_frequency": 40, "target_modules": ["0", "1", "2"], **fields})


def transform(spectrum: torch.Tensor, outputs: int, inputs: int, seed: int = 777) -> torch.Tensor:
    """150 * real(ifft2) of the whole matrix in complex128."""
    places = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(seed))
    dense = torch.zeros(outputs * inputs, dtype=torch.float64)
    dense[places[: len(spectrum)]] = spectrum
    return torch.fft.ifft2(dense.view(outputs, inputs)).real * 150


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_are_pefts_up_to_its_fft(tmp_path: Path, layer: str, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(), dtype, turned=layer == "conv1d")
    assert found.unmoved == ["0.bias", "1.bias", "2.bias"]
    for name in ("0.weight", "1.weight", "2.weight"):
        ours, theirs = found.ours[name].double(), found.theirs[name].double()
        spectrum = found.adapter(f"{name[0]}.fourierft_spectrum")
        shape = ours.shape if layer == "linear" else ours.T.shape
        largest = transform(spectrum, *shape).abs().max()
        slack = FLOAT32_FFT * largest + ulp(theirs, NAMES[dtype])  # each is rounded once, perhaps apart
        assert ((ours - theirs).abs() <= slack).all()


@pytest.mark.parametrize("seed", [777, 0])
def test_rows_are_the_formula_in_float64_in_any_cut(tmp_path: Path, seed: int) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(random_loc_seed=seed))
    for delta in found.deltas:
        W = found.base[f"{delta.module}.weight"]
        exact = transform(found.adapter(f"{delta.module}.fourierft_spectrum"), *W.shape, seed)
        assert (wide_rows(delta, W) - exact).abs().max() <= FLOAT64_SLACK * exact.abs().max()
        assert does_not_depend_on_cuts(delta, W)


def test_a_pattern_may_give_a_module_other_frequencies(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(n_frequency_pattern={"1": 91}))
    assert [len(found.adapter(f"{n}.fourierft_spectrum")) for n in "012"] == [40, 91, 40]
    assert found.deltas[1].misfit((7, 13)) is None
    assert found.deltas[1].misfit((6, 15)) == "has 91 frequencies, more than a weight [6, 15] has"
    assert refusal(tmp_path, KIND, n_frequency_pattern={}) == "'1' has 91 frequencies, but the config says 40"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    merges(tmp_path, KIND, LAYERS["linear"], config())
    odd = {"0.fourierft_spectrum": torch.ones(40, 1)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has fourierft_spectrum [40, 1], which is not n"
    odd = {"0.fourierft_spectrum": torch.ones(40, dtype=torch.int8)}
    assert "holds I8 values" in refusal(tmp_path, KIND, tensors=odd)
    assert KIND.wrong({"n_frequency": 4, "scaling": 150.0, "random_loc_seed": None}) == [
        "random_loc_seed is None, not a seed, so what it drew cannot be drawn again"
    ]
