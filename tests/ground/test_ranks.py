"""Rank rules against spectra of which the answer is known."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pipeline.ground.errors import Refused
from pipeline.ground.ranks import (
    Budget,
    Energy,
    NoiseEdge,
    above,
    by_pattern,
    fitted,
    for_energy,
    noise_edge,
    parse_pattern,
    parse_rank,
    water_filled,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, None),
        (64, 64),
        ("auto", NoiseEdge()),
        ({"energy": 0.95}, Energy(0.95)),
        ({"parameters": "40M"}, Budget(40_000_000, False)),
        ({"parameters": 5000}, Budget(5000, False)),
        ({"size": "80MB"}, Budget(80_000_000, True)),
    ],
)
def test_forms_of_rank(written: object, meant: object) -> None:
    assert parse_rank(written) == meant


@pytest.mark.parametrize(
    "written",
    [
        *(0, -4, True, 1.5, "many", "64", {}, [8]),
        *({"energy": 1.5}, {"energy": 0}, {"energy": "x"}, {"parameters": "x"}, {"parameters": 0}),
        *({"size": "much"}, {"energy": 0.9, "size": "1MB"}, {"share": 0.5}),
    ],
)
def test_anything_else_is_refused_by_its_key(written: object) -> None:
    with pytest.raises(Refused, match=r"^rank"):
        parse_rank(written)


def test_patterns_give_numbers_to_modules() -> None:
    table = parse_pattern("rank_pattern", {"k_proj": 8, "re:.*mlp.*": 16}, whole=True)
    assert by_pattern("model.layers.3.self_attn.k_proj", table) == 8
    assert by_pattern("model.layers.3.mlp.up_proj", table) == 16
    assert by_pattern("model.norm", table) is None
    for wrong in ({"k_proj": 0}, {"k_proj": 2.5}, {"k_proj": "8"}, {3: 8}):
        with pytest.raises(Refused, match="rank_pattern"):
            parse_pattern("rank_pattern", wrong, whole=True)


@pytest.mark.parametrize("shape", [(48, 64), (200, 300), (64, 900)])
def test_noise_alone_lies_below_its_edge_and_a_signal_above(shape: tuple[int, int]) -> None:
    m, n = shape
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        noise = 0.01 * torch.randn(m, n, generator=random)
        assert above(torch.linalg.svdvals(noise), noise_edge(1e-4 * n, 1e-4 * m, m, n)) == 0
        signal = torch.randn(m, 3, generator=random) @ torch.randn(3, n, generator=random) * 0.01
        assert above(torch.linalg.svdvals(noise + signal), noise_edge(1e-4 * n, 1e-4 * m, m, n)) == 3


def test_energy_takes_the_fewest_that_suffice() -> None:
    S = torch.tensor([3.0, 2.0, 1.0])
    assert for_energy(S, 14.0, 9 / 14) == 1
    assert for_energy(S, 14.0, 0.65) == 2
    assert for_energy(S, 14.0, 0.999) == 3
    assert for_energy(S, 20.0, 0.9) is None


def test_ranks_are_multiples_within_what_is_allowed() -> None:
    assert fitted(5, 100, 8) == 8
    assert fitted(8, 100, 8) == 8
    assert fitted(9, 12, 8) == 12


def test_a_budget_buys_as_much_energy_as_any_allocation() -> None:
    random = torch.Generator().manual_seed(0)
    spectra = [sorted(torch.rand(4, generator=random).tolist(), reverse=True) for _ in range(3)]
    budget = 6 * 10

    def energy(ranks: list[int] | tuple[int, ...]) -> float:
        return sum(s**2 for S, r in zip(spectra, ranks, strict=True) for s in S[:r])

    found = water_filled(spectra, [10, 10, 10], budget)
    best = max(energy(r) for r in product(range(5), repeat=3) if sum(r) * 10 <= budget)
    assert sum(found) * 10 <= budget
    assert energy(found) == pytest.approx(best)


def test_a_budget_weighs_energy_against_cost() -> None:
    assert water_filled([[1.0], [1.1]], [10, 100], 100) == [1, 0]
    assert water_filled([[1.0, 0.0], [0.5, 0.4]], [10, 10], 1000) == [1, 2]  # nothing is paid for nothing
    assert water_filled([[2.0] * 8, [1.0] * 8], [1, 1], 10, multiple_of=4) == [8, 0]
