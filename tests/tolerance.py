"""Every tolerance of the tests, derived and named once."""

from __future__ import annotations

import torch

from pipeline.ground.rounding import ulp

# A float32 sum W + s * (B @ A) is off by at most this share of |W| + s |B| |A|, elementwise: the product
# over the rank (well under 2^-22 for ranks up to some hundreds, accumulated in float32) and the sum.
FLOAT32_SLACK = 2.0**-21

# The same in float64, whose last place is 2^-29 of float32's.
FLOAT64_SLACK = 2.0**-50

# Two float64 computations of one formula by other ways, of the largest element: norms, solved systems and
# products of a few matrices, each of whose sums of up to some hundred terms is off by 2^-46 or so.
FLOAT64_FORMULA = 2.0**-44

# An element that a float32 FFT gives, there and back, over up to 2^16 elements is off by less than this
# share of the largest one: two last places, 2^-23, for each of 2 * 16 steps.
FLOAT32_FFT = 2.0**-17

# Extracted factors in float32 give the difference back to this share of its norm: the difference itself, its
# projection and both factors are each rounded to 2^-24 of their sizes, summed over a rank of up to 32.
FLOAT32_FACTORS = 2.0**-19

# Two merges of one adapter are compared in units of the last place of the largest of base, delta and
# result: where the first two nearly cancel, the result's own last place says nothing of either.
#
# PEFT adds some deltas only after it has cast them to the base's dtype: half a unit there, and half a unit
# for each of the two results.
ROUNDED_DELTA_ULPS = 1.5
# Two float32 computations of one formula in other orders (torch's convolution against a product, norms in
# float32 against float64), each within FLOAT32_SLACK: 2^-20 of the terms, whose last place is 2^-24 of them.
OTHER_ORDER_ULPS = 16.0
# The same rounded to 16 bits: where a rounding tips over.
TIPPED_ULPS = 1.0

# Relative error of a sum that torch takes in float32 over up to a million elements of one sign (norms).
FLOAT32_SUM = 1e-4

# The same in float64, by whatever order: a variance taken as a difference of squares loses a few digits more.
FLOAT64_SUM = 1e-9

# A mean of a million zero-mean float32 elements is off by about the element size times this.
FLOAT32_MEAN = 1e-5

# Log-probabilities in float32, renormalised in float64: their KL divergences agree to this, relatively.
FLOAT32_KL = 1e-6

# Logits of merged and unmerged float32 models differ by the order of float32 sums: by less than this
# share of what the adapter does to them.
FLOAT32_FORWARD = 1e-3

# Of the largest singular value: what float32 leaves in directions that a matrix does not have.
NO_DIRECTION = 1e-4


def within_half_ulp(stored: torch.Tensor, exact: torch.Tensor, dtype: str, size: torch.Tensor) -> bool:
    """Whether stored values are the exact float64 ones, rounded once after a float32 sum of `size` parts."""
    error = (stored.double() - exact).abs()
    return bool((error <= ulp(exact, dtype) / 2 + FLOAT32_SLACK * size).all())


def worst_ulp(stored: torch.Tensor, exact: torch.Tensor, dtype: str) -> float:
    """Largest distance in units of the last place."""
    return float(((stored.double() - exact).abs() / ulp(exact, dtype)).max())


def ulps_apart(one: torch.Tensor, other: torch.Tensor, size: torch.Tensor, dtype: str) -> float:
    """Largest difference of two results, in units of the last place of what they are sums of."""
    if not one.numel():
        return 0.0
    return float(((one.double() - other.double()).abs() / ulp(size.double(), dtype)).max())


def num_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """Elements whose values differ; -0.0 and 0.0 are equal, NaN and NaN are too."""
    return int(((one != other) & ~(one.isnan() & other.isnan())).sum())
