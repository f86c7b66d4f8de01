"""SHiRA against PEFT's own merge: one sum and one rounding on both sides, so equal bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import ShiraConfig
from torch import nn

from pipeline.ground.deltas.shira import KIND
from pipeline.ground.errors import Refused
from tests.ground.deltas.claims import (
    DTYPES,
    does_not_depend_on_cuts,
    merges,
    refusal,
    rewrite,
    turns,
    wide_rows,
)
from tests.ground.deltas.parity import deltas, merged_by_us

LAYERS: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
    nn.Linear(11, 13), nn.Linear(13, 7, bias=False)
)


def config() -> ShiraConfig:
    return ShiraConfig(target_modules=["0", "1"], r=3, random_seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_entries_are_added_as_peft_does(tmp_path: Path, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), dtype)
    assert found.different == []
    assert found.unmoved == ["0.bias"]


def test_rows_are_the_formula_in_float64(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        dense = torch.zeros(weight.shape, dtype=torch.float64)
        values = found.adapter(f"{delta.module}.shira_weight")
        for value, i, j in zip(
            values, *found.adapter(f"{delta.module}.shira_indices", torch.int64), strict=True
        ):
            dense[i, j] += value
        assert torch.equal(wide_rows(delta, weight), dense)
        assert does_not_depend_on_cuts(delta, weight) and turns(delta, weight)


def test_indices_in_any_order_or_twice_or_as_floats_mean_the_same_entries(tmp_path: Path) -> None:
    """On Windows PEFT writes floats; entries that stand twice add up, as in its sparse tensor."""
    found = merges(tmp_path, KIND, LAYERS, config())
    values, indices = found.adapter("0.shira_weight"), found.adapter("0.shira_indices", torch.int64)
    odd = torch.cat([indices[:, 1:].flip(1), indices[:, 1:2]], 1)
    tensors = {
        "0.shira_weight": torch.cat([values[1:].flip(0), values[1:2]]).float(),
        "0.shira_indices": odd.float(),
    }
    rewrite(tmp_path, tensors=tensors)
    again = deltas(tmp_path, KIND)
    weight = found.base["0.weight"]
    expected = torch.zeros(13, 11, dtype=torch.float64)
    expected[indices[0], indices[1]] = values
    expected[indices[0, 0], indices[1, 0]] = 0
    expected[indices[0, 1], indices[1, 1]] *= 2
    assert torch.equal(wide_rows(next(d for d in again if d.module == "0"), weight), expected)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    assert found.deltas[0].misfit((13, 12)) == "was made for a weight whose sides add up to 24"
    assert found.deltas[0].misfit((13, 11)) is None
    indices = found.adapter("0.shira_indices", torch.int32)
    for odd in (indices + 8, indices - 3, indices.float() + 0.5):
        rewrite(tmp_path, tensors={"0.shira_indices": odd})
        with pytest.raises(Refused, match=r"'0' has shira_indices that lie outside of \[13, 11\]"):
            merged_by_us(found.base, deltas(tmp_path, KIND))
    assert refusal(tmp_path, KIND, drop=["shira_indices"]) == "'0' has shira_weight but no shira_indices"
