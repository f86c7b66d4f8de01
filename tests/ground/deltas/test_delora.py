"""DeLoRA against PEFT's own merge.

On a float32 base both are the same float32 sums: equal bits. On 16-bit bases PEFT rounds the delta before it
adds it and rounds again, so it is off by half a place of the delta where we are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import DeloraConfig
from torch import nn

from pipeline.ground.deltas.delora import KIND
from pipeline.ground.rounding import ulp
from tests.ground.deltas.claims import (
    DTYPES,
    Merges,
    does_not_depend_on_cuts,
    merges,
    refusal,
    rewrite,
    turns,
    wide_rows,
)
from tests.ground.deltas.parity import NAMES, WHOLE, deltas
from tests.tolerance import FLOAT32_SLACK, FLOAT64_SLACK, within_half_ulp

LAYERS: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
    nn.Linear(23, 13), nn.Linear(37, 7, bias=False)
)


def config() -> DeloraConfig:
    return DeloraConfig(target_modules=["0", "1"], r=3, rank_pattern={"1": 5}, lambda_pattern={"0": 4})


def formula(found: Merges, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(delta, the sum of its terms' sizes) in float64."""
    A, B, strength, norms = (
        found.adapter(f"{module}.delora_{name}") for name in ("A", "B", "lambda", "w_norm")
    )
    terms = [
        torch.outer(b, a)
        * (strength / len(A) / max(float(a.norm()), 1e-4) / max(float(b.norm()), 1e-4))
        * norms
        for a, b in zip(A, B.T, strict=True)
    ]
    return sum(terms, torch.zeros(())), sum((t.abs() for t in terms), torch.zeros(()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_is_the_formula_rounded_once_where_peft_rounds_twice(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), dtype, block=WHOLE)
    assert found.unmoved == ["0.bias"]
    assert [delta.rank for delta in found.deltas] == [3, 5]
    for delta in found.deltas:
        name = f"{delta.module}.weight"
        D, size = formula(found, delta.module)
        W = found.base[name].double()
        size = size + W.abs()
        assert within_half_ulp(found.ours[name], W + D, NAMES[dtype], size)
        error = (found.theirs[name].double() - (W + D)).abs()
        half = ulp(W + D, NAMES[dtype]) / 2
        assert bool((error <= half + ulp(D, NAMES[dtype]) / 2 + FLOAT32_SLACK * size).all())
        if dtype == torch.float32:
            assert torch.equal(found.ours[name], found.theirs[name])
        else:
            assert not bool((error <= half + FLOAT32_SLACK * size).all())


def test_rows_are_the_formula_in_float64(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        D, size = formula(found, delta.module)
        assert bool(((wide_rows(delta, weight) - D).abs() <= FLOAT64_SLACK * size).all())
        assert does_not_depend_on_cuts(delta, weight) and turns(delta, weight)


def test_an_untrained_b_of_zeros_gives_no_delta(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    rewrite(tmp_path, tensors={"0.delora_B": torch.zeros(13, 3)})
    delta = next(d for d in deltas(tmp_path, KIND) if d.module == "0")
    assert not wide_rows(delta, found.base["0.weight"]).any()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config())
    assert found.deltas[0].misfit((13, 24)) == "was made for a weight [13, 23]"
    assert refusal(tmp_path, KIND, rank_pattern={"1": 4}) == "'1' has rank 5, but the config says 4"
    assert refusal(tmp_path, KIND, rank_pattern={}) == "'1' has rank 5, but the config says 3"
    odd = {"0.delora_w_norm": torch.zeros(22)}
    assert refusal(tmp_path, KIND, tensors=odd) == "'0' has delora_w_norm [22], in of in being 23"
    assert refusal(tmp_path, KIND, drop=["0.delora_w_norm"]) == (
        "'0' has delora_A, delora_B, delora_lambda but no delora_w_norm"
    )
    assert KIND.wrong({"r": 8, "rank_pattern": {"a": 0}}) == [
        "rank_pattern is {'a': 0}, not a table of patterns and numbers"
    ]
