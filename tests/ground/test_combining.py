"""What is kept of deltas and how they become one, against PEFT's formulas and plain counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import fsum, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from pipeline.ground.combining import Combination, MajoritySign, ordered_sum
from pipeline.ground.errors import Refused
from pipeline.ground.selecting import AtRandom, Largest, Spot, draws, key, thresholds
from tests.tolerance import FLOAT32_SLACK, num_different

ROWS, COLUMNS = 48, 40
WEIGHTS = [0.7, 0.5, -0.3, 1.0, 2.0]


pytestmark = pytest.mark.usefixtures("one_thread")


def some_deltas(count: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64) for _ in range(count)]


def combined(
    combination: Combination,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    height: int = ROWS,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """All rows of the combination of whole deltas, by tiles of `height` rows."""
    size = deltas[0].numel()
    spots = [Spot("w", n, f, COLUMNS, size) for n, f in enumerate(weights[: len(deltas)])]
    grid = [(start, min(start + height, ROWS)) for start in range(0, ROWS, height)]
    combine = combination.open(spots, grid, lambda start, stop: (d[start:stop].float() for d in deltas))
    return torch.cat([combine(a, (d[a:b] for d in deltas), dtype) for a, b in grid])


# The formulas


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_are_pefts_bit_for_bit(count: int, density: float) -> None:
    deltas, weights = some_deltas(count), torch.tensor(WEIGHTS[:count])
    seen = [delta.float() for delta in deltas]
    pruned = combined(Combination("", Largest(density)), deltas, WEIGHTS)
    assert num_different(pruned, merge_utils.magnitude_prune(seen, weights, density)) == 0
    for sign in MajoritySign:
        ours = combined(Combination("", Largest(density), sign), deltas, WEIGHTS)
        assert num_different(ours, merge_utils.ties(seen, weights, density, sign.value)) == 0


@pytest.mark.parametrize("count", [3, 5])
def test_more_are_pefts_but_for_the_order_of_a_float32_sum(count: int) -> None:
    deltas, weights = some_deltas(count, seed=3), torch.tensor(WEIGHTS[:count])
    seen = [delta.float() for delta in deltas]
    size = sum(abs(w) * s.abs() for w, s in zip(WEIGHTS, seen, strict=False))
    pairs = [
        (
            combined(Combination("", Largest(0.3)), deltas, WEIGHTS),
            merge_utils.magnitude_prune(seen, weights, 0.3),
        )
    ]
    for sign in MajoritySign:
        ours = combined(Combination("", Largest(0.3), sign), deltas, WEIGHTS)
        pairs.append((ours, merge_utils.ties(seen, weights, 0.3, sign.value)))
    for ours, theirs in pairs:
        assert bool(((ours - theirs).abs() <= FLOAT32_SLACK * size).all())
        assert bool(ours.any())


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_is_pefts_with_our_own_chance(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    deltas, weights, seed = some_deltas(2), torch.tensor(WEIGHTS[:2]), 11
    size = ROWS * COLUMNS

    def masks() -> Iterator[torch.Tensor]:
        for number in range(2):
            drawn = draws(key(seed, number, "w"), 0, size, "cpu").view(ROWS, COLUMNS)
            yield (drawn < int(density * 2**53)).float()

    def by(theirs: Iterator[torch.Tensor]) -> None:
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(theirs))

    seen = [delta.float() for delta in deltas]
    by(masks())
    theirs = merge_utils.dare_linear(seen, weights, density)
    assert num_different(combined(Combination("", AtRandom(density, seed)), deltas, WEIGHTS), theirs) == 0
    for sign in MajoritySign:
        by(masks())
        theirs = merge_utils.dare_ties(seen, weights, density, sign.value)
        ours = combined(Combination("", AtRandom(density, seed), sign), deltas, WEIGHTS)
        assert num_different(ours, theirs) == 0


WAYS = [
    Combination("", Largest(0.3)),
    Combination("", Largest(0.3), MajoritySign.total),
    Combination("", Largest(0.3), MajoritySign.frequency),
    Combination("", AtRandom(0.3, 5)),
    Combination("", AtRandom(0.3, 5), MajoritySign.total),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_neither_tiles_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch, way: Combination) -> None:
    deltas = some_deltas(3)
    whole = combined(way, deltas, WEIGHTS)
    for height, workers in ((1, 4), (7, 1), (16, 3)):
        monkeypatch.setattr("pipeline.ground.selecting.WORKERS", workers)
        assert torch.equal(combined(way, deltas, WEIGHTS, height), whole)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_float64_has_the_same_elements(way: Combination) -> None:
    """Else a recomputation in float64 would say nothing of what float32 made."""
    deltas = some_deltas(3)
    near = [delta.float().double() * (1 + 1e-9) for delta in deltas]  # float32 rounds these to the same
    narrow, wide = combined(way, deltas, WEIGHTS), combined(way, near, WEIGHTS, dtype=torch.float64)
    assert wide.dtype == torch.float64
    size = sum(abs(w) * d.abs() for w, d in zip(WEIGHTS, deltas, strict=False)) / 0.3
    assert bool(((narrow.double() - wide).abs() <= FLOAT32_SLACK * size).all())


def test_what_float32_cannot_tell_apart_is_chosen_alike() -> None:
    random = torch.Generator().manual_seed(0)
    delta = 1 + 1e-9 * torch.rand(ROWS, COLUMNS, generator=random, dtype=torch.float64)
    assert bool(combined(Combination("", Largest(0.3)), [delta], [1.0], dtype=torch.float64).all())
    even = [delta, -1 - 1e-9 * torch.rand(ROWS, COLUMNS, generator=random, dtype=torch.float64)]
    ties = Combination("", Largest(1.0), MajoritySign.total)
    assert torch.equal(combined(ties, even, [1.0, 1.0], dtype=torch.float64), delta)


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_the_order_of_deltas_changes_no_bit(way: Combination) -> None:
    deltas = some_deltas(4)
    whole = combined(way, deltas, WEIGHTS)
    for order in ((1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)):
        again = combined(way, [deltas[i] for i in order], [WEIGHTS[i] for i in order])
        assert torch.equal(again, whole)


def test_neither_the_size_nor_the_sign_of_a_weight_votes() -> None:
    large, small = torch.full((ROWS, COLUMNS), 2.0).double(), torch.full((ROWS, COLUMNS), -1.0).double()
    ties = Combination("", Largest(1.0), MajoritySign.total)
    assert bool((combined(ties, [large, small], [0.01, 100.0]) == large.float() * 0.01).all())
    assert bool((combined(ties, [large, small], [-1.0, 1.0]) == -2.0).all())


def test_even_votes_elect_plus() -> None:
    one = torch.full((ROWS, COLUMNS), 3.0).double()
    for sign in MajoritySign:
        assert bool((combined(Combination("", Largest(1.0), sign), [one, -one], [1.0, 1.0]) == 3.0).all())


def test_what_is_not_finite_is_not_hidden() -> None:
    deltas = some_deltas(2)
    deltas[0][3, 4] = torch.nan
    for way in (*WAYS[:3], Combination("", Largest(1.0), MajoritySign.total)):
        assert not bool(combined(way, deltas, WEIGHTS)[3, 4].isfinite())


# The largest


VALUES = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 1.0 + 2.0**-23]),
    ),
    min_size=1,
    max_size=60,
)


@given(VALUES, st.floats(0, 1), st.integers(1, 9))
def test_the_threshold_is_the_k_th_largest_magnitude(values: list[float], share: float, height: int) -> None:
    rows = torch.tensor(values, dtype=torch.float32).view(-1, 1)
    count = int(share * len(values))
    grid = [(start, min(start + height, len(rows))) for start in range(0, len(rows), height)]
    bits = thresholds(grid, lambda a, b: [rows[a:b], -rows[a:b]], [count, 1])
    magnitudes = rows.abs().flatten().sort(descending=True).values
    found = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert found[1] == magnitudes[0]
    assert found[0].isnan() if count == 0 else found[0] == magnitudes[count - 1]


def test_equal_magnitudes_at_the_threshold_all_stay() -> None:
    delta = torch.full((ROWS, COLUMNS), 0.25, dtype=torch.float64)
    delta[::2] = -0.25
    delta[0, 0] = 4.0
    kept = combined(Combination("", Largest(0.1)), [delta], [1.0])
    assert torch.equal(kept, delta.float())
    delta[1:] = 0.125
    kept = combined(Combination("", Largest(10 / delta.numel())), [delta], [1.0])
    assert int(kept.count_nonzero()) == COLUMNS  # one of 4, and all 39 of 0.25 for the nine that are wanted


def test_a_density_that_leaves_no_element_keeps_none() -> None:
    assert not bool(combined(Combination("", Largest(1e-6)), some_deltas(2), WEIGHTS).any())


# At random


def splitmix64(stream: int, count: int) -> list[int]:
    """The reference implementation (Vigna, prng.di.unimi.it/splitmix64.c) in whole numbers."""
    found, state, mask = [], stream, (1 << 64) - 1
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & mask
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        found.append((z ^ z >> 31) >> 11)
    return found


@pytest.mark.parametrize("stream", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, key(7, 1, "model.weight")])
def test_draws_are_splitmix64(stream: int) -> None:
    assert draws(stream, 0, 500, "cpu").tolist() == splitmix64(stream, 500)
    assert draws(stream, 123, 500, "cpu").tolist() == splitmix64(stream, 500)[123:]


def test_the_reference_is_the_published_one() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317 >> 11, 3203168211198807973 >> 11]


def test_streams_differ_by_seed_adapter_and_weight() -> None:
    keys = [key(0, 0, "a"), key(1, 0, "a"), key(0, 1, "a"), key(0, 0, "b"), key(-1, 0, "a"), key(10, 0, "a")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= found < 2**64 for found in keys)


SIGMAS = 5  # of a binomial count: one in two million


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_masks_are_as_dense_as_told_and_independent(density: float) -> None:
    size = 1 << 20
    masks = [
        draws(key(seed, adapter, weight), 0, size, "cpu") < int(density * 2**53)
        for seed, adapter, weight in ((0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"))
    ]
    for number, mask in enumerate(masks):
        assert is_share(mask, density)
        assert is_share(mask[1:] & mask[:-1], density**2, pairs=2)
        for other in masks[:number]:
            assert is_share(mask & other, density**2)


def is_share(mask: torch.Tensor, share: float, pairs: int = 1) -> bool:
    """Whether a count lies where draws of that share put it; neighbours share an element, so spread more."""
    deviation = sqrt(mask.numel() * share * (1 - share) * (2 * pairs - 1))
    return abs(int(mask.sum()) - share * mask.numel()) <= SIGMAS * deviation


# Sums


def test_an_ordered_sum_has_no_order() -> None:
    parts = [delta.float() * 10.0 ** (3 * n) for n, delta in enumerate(some_deltas(4))]
    sums = [ordered_sum(list(order)) for order in permutations(parts)]
    assert all(torch.equal(found, sums[0]) for found in sums)
    plain = [order[0] + order[1] + order[2] + order[3] for order in permutations(parts)]
    assert not all(torch.equal(found, plain[0]) for found in plain)
    exact = torch.tensor(
        [fsum(column) for column in zip(*(p.flatten().tolist() for p in parts), strict=True)]
    )
    size = sum(part.abs() for part in parts).flatten()
    assert bool(((sums[0].flatten() - exact).abs() <= FLOAT32_SLACK * size).all())


@pytest.mark.parametrize("density", [0.0, -0.5, 1.0000001, float("nan"), float("inf")])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    for selection in (lambda: Largest(density), lambda: AtRandom(density, 0)):
        with pytest.raises(Refused, match=r"merge\.density: .* is no share of a delta to keep"):
            selection()
