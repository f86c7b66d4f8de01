"""Rank rules on whatever spectra: what they promise holds, and water-filling is as good as trying all."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.ground.ranks import above, fitted, for_energy, noise_edge, water_filled

# Singular values of matrices: falling, some of them equal, some 0.
SPECTRUM = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(
    lambda values: [float(v) for v in sorted(values, reverse=True)]
)
SPECTRA = st.lists(SPECTRUM, min_size=1, max_size=4)


def energy(spectra: list[list[float]], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(s * s for S, rank in zip(spectra, ranks, strict=True) for s in S[:rank])


def cost(costs: list[int], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(c * rank for c, rank in zip(costs, ranks, strict=True))


def best(spectra: list[list[float]], costs: list[int], budget: int) -> float:
    """The most that any ranks within the budget hold, by trying all of them."""
    all_ranks = product(*(range(len(S) + 1) for S in spectra))
    assert prod(len(S) + 1 for S in spectra) <= 6**4
    return max(energy(spectra, ranks) for ranks in all_ranks if cost(costs, ranks) <= budget)


@given(SPECTRA, st.integers(1, 9), st.integers(0, 120))
def test_at_equal_costs_no_other_ranks_hold_more(spectra: list[list[float]], price: int, budget: int) -> None:
    costs = [price] * len(spectra)
    assert energy(spectra, water_filled(spectra, costs, budget)) == best(spectra, costs, budget)


@given(SPECTRA, st.data(), st.integers(0, 120))
def test_at_other_costs_none_hold_more_for_a_budget_that_is_one_step_smaller(
    spectra: list[list[float]], data: st.DataObject, budget: int
) -> None:
    """What fits is a knapsack; greed is only sure of all but the step that no longer fitted."""
    costs = data.draw(st.lists(st.integers(1, 12), min_size=len(spectra), max_size=len(spectra)))
    found = energy(spectra, water_filled(spectra, costs, budget))
    assert found <= best(spectra, costs, budget)
    if budget >= max(costs):
        assert found >= best(spectra, costs, budget - max(costs))


@given(SPECTRA, st.data(), st.integers(0, 200), st.integers(1, 4))
def test_a_budget_is_never_exceeded_and_nothing_that_fits_is_left(
    spectra: list[list[float]], data: st.DataObject, budget: int, multiple_of: int
) -> None:
    costs = data.draw(st.lists(st.integers(1, 12), min_size=len(spectra), max_size=len(spectra)))
    ranks = water_filled(spectra, costs, budget, multiple_of)
    left = budget - cost(costs, ranks)
    assert left >= 0
    for S, price, rank in zip(spectra, costs, ranks, strict=True):
        assert rank == len(S) or rank % multiple_of == 0
        step = S[rank : rank + multiple_of]
        assert not any(step) or len(step) * price > left  # worth nothing, or too dear


@given(SPECTRUM, st.floats(0.01, 0.999))
def test_the_fewest_that_hold_a_share_of_the_energy(S: list[float], share: float) -> None:
    total = sum(s * s for s in S)
    assume(total > 0)
    count = for_energy(torch.tensor(S), total, share)
    assert count is not None
    assert energy([S], [count]) >= share * total
    assert energy([S], [count - 1]) < share * total


@given(SPECTRUM, st.floats(0.01, 0.999), st.floats(0.1, 100))
def test_where_all_known_triples_hold_too_little_that_is_said(
    S: list[float], share: float, beyond: float
) -> None:
    total = sum(s * s for s in S) + beyond
    count = for_energy(torch.tensor(S), total, share)
    assert (count is None) == (energy([S], [len(S)]) < share * total)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 64))
def test_a_rank_is_the_next_multiple_within_the_most(rank: int, most: int, multiple_of: int) -> None:
    found = fitted(rank, most, multiple_of)
    assert found <= most
    assert found == most or (found % multiple_of == 0 and rank <= found < rank + multiple_of)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0, 10))
def test_what_lies_above_an_edge_is_a_head_of_the_spectrum(values: list[float], edge: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    count = above(S, edge)
    assert bool((S[:count] > edge).all())
    assert bool((S[count:] <= edge).all())


@given(st.integers(2, 4096), st.integers(2, 4096), st.floats(1e-12, 1e3))
def test_the_edge_of_even_noise_is_that_of_marchenko_and_pastur_and_a_little_more(
    m: int, n: int, variance: float
) -> None:
    edge = noise_edge(variance * n, variance * m, m, n)
    plain = variance**0.5 * (m**0.5 + n**0.5)
    assert plain < edge < 1.7 * plain
    assert abs(noise_edge(4 * variance * n, 4 * variance * m, m, n) / edge - 2) < 1e-9
