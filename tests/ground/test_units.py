"""Sizes as people read them."""

from __future__ import annotations

from math import inf

import pytest

from pipeline.ground.units import show_ulps


@pytest.mark.parametrize(
    ("distance", "shown"),
    [
        (0.0, "0 ulp"),
        (0.49991, "0.4999 ulp"),
        (1.5, "1.5 ulp"),
        (998.7, "998.7 ulp"),
        (12_345.678, "12.3 thousand ulp"),
        (12_345_678_901.2, "12.3 billion ulp"),
        (3.4e38, "over a thousand trillion ulp"),
        (inf, "over a thousand trillion ulp"),
    ],
)
def test_distances_are_read_at_a_glance(distance: float, shown: str) -> None:
    assert show_ulps(distance) == shown
