"""Stochastic rounding: unbiased, a function of name and place alone, and right at the edges of a dtype."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import inf, nan, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.rounding import round_by_chance, round_to, stream_of, takes_chance, ulp

COARSE = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]
LEAST = {"BF16": 1e-3, "F16": 1e-7, "F8_E4M3": 2e-3, "F8_E5M2": 2e-5}  # subnormal but for bfloat16


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def numbers(dtype: str) -> list[float]:
    """All finite numbers of a dtype, in order."""
    width = torch_dtype(dtype).itemsize * 8
    bits = torch.arange(2**width, dtype=torch.int32)
    values = bits.to(torch.int16 if width == 16 else torch.uint8).view(torch_dtype(dtype)).float()
    return sorted(set(values[values.isfinite()].tolist()))


@cache
def grid_of(dtype: str) -> Any:
    return np.array(numbers(dtype))


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("size", [1.0, None])
def test_the_mean_of_many_draws_is_the_value(dtype: str, size: float | None) -> None:
    """A draw is off by less than a unit and by none in the mean; its deviation is half a unit at most."""
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * (size or LEAST[dtype])
    count, total = 100, torch.zeros(20_000, dtype=torch.float64)
    unit = ulp(values.double(), dtype)
    for seed in range(count):
        drawn = round_by_chance(values, dtype, stream_of(seed, "w"), 0).double()
        assert bool(((drawn - values).abs() < unit).all())
        total += drawn
    off = (total / count - values.double()) / unit
    assert float(off.abs().max()) < 6 * 0.5 / sqrt(count)  # Hoeffding: 1 in 10^7 for each
    assert abs(float(off.mean())) < 5 * 0.5 / sqrt(count * len(values))


@pytest.mark.parametrize("dtype", COARSE)
@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_a_value_goes_to_one_of_its_two_neighbours(dtype: str, values: list[float]) -> None:
    grid = grid_of(dtype)
    drawn = round_by_chance(torch.tensor(values), dtype, 7, 3).double().tolist()
    plain = round_to(torch.tensor(values), dtype).double().tolist()
    for value, found, nearest in zip(values, drawn, plain, strict=True):
        if abs(value) > grid[-1]:  # beyond the range, as nearest
            assert found == nearest or (np.isnan(found) and np.isnan(nearest))
            continue
        below = grid[np.searchsorted(grid, value, side="right") - 1]
        above = grid[np.searchsorted(grid, value, side="left")]
        assert found in (below, above)
        assert np.signbit(found) == np.signbit(value) or value == 0


@pytest.mark.parametrize("dtype", COARSE)
def test_numbers_of_the_dtype_stay(dtype: str) -> None:
    values = torch.tensor(numbers(dtype))
    assert torch.equal(round_by_chance(values, dtype, 1, 0).float(), values)


@pytest.mark.parametrize("dtype", COARSE)
def test_bits_depend_on_name_seed_and_place_alone(dtype: str) -> None:
    values = torch.randn(600, generator=torch.Generator().manual_seed(1))
    stream = stream_of(0, "model.layers.0.weight")
    whole = round_by_chance(values, dtype, stream, 5).float()
    for cut in (1, 2, 3, 7, 512):
        parts = [
            round_by_chance(values[i : i + cut], dtype, stream, 5 + i).float() for i in range(0, 600, cut)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(round_by_chance(values.view(30, 20), dtype, stream, 5).float(), whole.view(30, 20))
    for other in (stream_of(1, "model.layers.0.weight"), stream_of(0, "model.layers.1.weight")):
        assert not torch.equal(round_by_chance(values, dtype, other, 5).float(), whole)
    assert not torch.equal(round_by_chance(values, dtype, stream, 6).float(), whole)


def test_what_was_drawn_once_is_drawn_again() -> None:
    """The draws are part of what a seed means: another version must not change them."""
    for dtype, drawn in {
        "BF16": "10001011000111111011101101111110",
        "F16": "01100000010000110001110001111010",
        "F8_E4M3": "01100000010000110001110001111010",
    }.items():
        halves = 1 + torch.finfo(torch_dtype(dtype)).eps / 2
        up = round_by_chance(torch.full((32,), halves), dtype, stream_of(0, "w"), 5).float() > 1
        assert "".join(map(str, up.int().tolist())) == drawn


@pytest.mark.parametrize("dtype", COARSE)
def test_infinity_and_nan_stay_what_nearest_makes_of_them(dtype: str) -> None:
    values = torch.tensor([inf, -inf, nan, 3e38, -3.4e38])
    drawn, plain = round_by_chance(values, dtype, 0, 0).float(), round_to(values, dtype).float()
    assert torch.equal(drawn.isnan(), plain.isnan()) or dtype == "BF16"
    assert torch.equal(drawn.isinf(), plain.isinf())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float64_is_drawn_from_what_lies_beneath_float32(dtype: str) -> None:
    """A tie of float32 and a hair: the mean is right to the last place of float32."""
    exact = Fraction(1) + Fraction(1, 2**11) + Fraction(1, 2**40)
    values = torch.full((200_000,), float(exact), dtype=torch.float64)
    drawn = round_by_chance(values, dtype, 3, 0).double()
    unit = float(ulp(values[:1], dtype))
    assert abs(float(drawn.mean()) - float(exact)) < 5 * 0.5 * unit / sqrt(len(values))


def test_wide_dtypes_take_no_chance() -> None:
    assert [takes_chance(d) for d in ("F32", "F64", "I8", "U8")] == [False] * 4
    assert all(takes_chance(d) for d in COARSE)


def test_a_swallowed_delta_survives_on_average() -> None:
    """A tenth of half a unit on top of numbers of bfloat16: nearest keeps nothing of it, chance all."""
    base = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    delta = ulp(base.double(), "BF16").float() / 20
    T = base + delta
    kept = {
        "nearest": share(round_to(T, "BF16").float() - base, delta),
        "chance": share(round_by_chance(T, "BF16", 11, 0).float() - base, delta),
    }
    assert kept["nearest"] == 0
    assert abs(kept["chance"] - 1) < 0.1  # 5 deviations: 5 * sqrt(20 / 65536)


def share(change: Tensor, delta: Tensor) -> float:
    return float((change.double() * delta).sum() / (delta.double() ** 2).sum())
