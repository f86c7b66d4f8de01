"""One rounding, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ground.rounding import round_to, ulp

BITS = {"BF16": (8, 127), "F16": (11, 15), "F32": (24, 127)}  # significand, exponent bias


def nearest(value: float, dtype: str) -> Fraction | None:
    """The nearest number of the dtype, ties to even, in exact arithmetic; None beyond its range."""
    digits, bias = BITS[dtype]
    if value == 0:
        return Fraction(0)
    exact = Fraction(value)
    exponent = max(np.frexp(value)[1] - 1, 1 - bias)
    unit = Fraction(2) ** int(exponent - digits + 1)
    rounded = Fraction(round(exact / unit)) * unit  # Python rounds ties to even
    largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** bias
    return rounded if abs(rounded) <= largest else None


@pytest.mark.parametrize("dtype", BITS)
@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_float64_is_rounded_once(dtype: str, values: list[float]) -> None:
    rounded = round_to(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()
    for value, found in zip(values, rounded, strict=True):
        wanted = nearest(value, dtype)
        assert (wanted is None and abs(found) == np.inf) or Fraction(found) == wanted


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_values_that_two_roundings_get_wrong(dtype: str) -> None:
    digits, _ = BITS[dtype]
    half = 1 + 2.0**-digits  # a tie, and just above it: float32 drops what decides
    value = torch.tensor([half + 2.0**-40, half, half - 2.0**-40, -half - 2.0**-40], dtype=torch.float64)
    above = 1 + 2.0 ** (1 - digits)
    assert round_to(value, dtype).tolist() == [above, 1.0, 1.0, -above]
    assert value.float().to(round_to(value, dtype).dtype)[0] == 1.0  # what torch alone would do


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)])
def test_ulp_is_numpys_spacing(dtype: str, kind: type) -> None:
    values = np.concatenate(
        [np.array([0.0, 1.0, -1.0, 60000.0, 1e-7, 3e-8]), np.random.default_rng(0).normal(size=500)]
    )
    values = values.astype(kind)
    spacing = np.spacing(np.abs(values)).astype(np.float64)
    assert ulp(torch.from_numpy(values.astype(np.float64)), dtype).tolist() == spacing.tolist()
