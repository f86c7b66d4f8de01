"""Readings of single weights, and how causes are told, on samples made here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pipeline.ground import belongings
from pipeline.ground.causes import causes, look
from pipeline.ground.diagnosis import Cause, Sample, read
from pipeline.ground.factors import Scaling, reasons
from pipeline.ground.rounding import round_by_chance, round_to


def sample(
    name: str = "w", factor: float = 1.0, seed: int = 0, dtype: str = "BF16", size: float = 0.01
) -> Sample:
    """A weight with a rank-4 delta, `factor` times in what is stored."""
    random = torch.Generator().manual_seed(seed)
    W, B, A = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((48, 64), (48, 4), (4, 64))
    )
    W, D = round_to(W / 50, dtype).double(), size * B @ A / 2
    return Sample(
        name, W, D, round_to(W + factor * D, dtype).double(), dtype, Scaling(8, 4, False, 8, 4), True
    )


def told(samples: Sequence[Sample]) -> list[tuple[Cause, str]]:
    return causes([look(sample) for sample in samples])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("size", [3e-4, 1e-2])
def test_a_sound_weight_has_no_cause_however_small_its_delta(dtype: str, size: float) -> None:
    assert read(sample(dtype=dtype, size=size)).cause is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.25, 0.5, 1.07, 2.0, 4.0])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 3e-5])  # of 0.02, that of the weights
def test_the_factor_is_estimated(dtype: str, factor: float, size: float) -> None:
    found = read(sample(factor=factor, dtype=dtype, size=size))
    assert found.cause is (Cause.scale if factor else Cause.not_merged)
    assert abs(found.factor - factor) < 0.05


@pytest.mark.parametrize("size", [1e-2, 1e-4, 3e-5])
def test_two_merges_one_after_the_other_are_told_as_twice(size: float) -> None:
    one = sample(size=size)
    again = replace(one, stored=round_to(one.stored + one.delta, "BF16").double())
    assert read(again).factor == 2.0


def test_scrambled_experts_are_told_from_each_other() -> None:
    taken = [sample(f"model.layers.0.mlp.experts.{n}.up_proj.weight", seed=n) for n in range(8)]
    assert told(taken) == []
    mixed = [
        Sample(s.name, s.base, s.delta, round_to(s.base + o.delta, "BF16").double(), "BF16", whole=True)
        for s, o in zip(taken, [*taken[1:], taken[0]], strict=True)
        if o.delta is not None
    ]
    [(cause, words)] = told(mixed)
    assert cause is Cause.swapped
    assert (
        "all 8 merged weights: experts are scrambled: model.layers.0.mlp.experts.0.up_proj.weight got"
        in words
    )
    assert words.endswith("experts.1.up_proj.weight")


def test_weights_that_share_a_cause_are_told_once() -> None:
    taken = [sample(f"model.layers.{n}.q", factor=2.0 if n < 5 else 1.0, seed=n) for n in range(8)]
    [(cause, words)] = told(taken)
    assert cause is Cause.scale
    assert words.startswith(
        "5 of 8 merged weights, as model.layers.0.q: holds 2 times the delta: merged twice"
    )


def test_deltas_that_rounding_nearly_swallowed_agree_with_the_others() -> None:
    """Of themselves they would be told as scaled by some other number."""
    sizes = [1e-2, 3e-4, 1e-5, 1e-2, 3e-6, 1e-2, 1e-2, 1e-5]
    exact = [sample(f"layers.{n}.q", 2.0, seed=n, dtype="F64", size=size) for n, size in enumerate(sizes)]
    taken = [
        replace(s, stored=round_by_chance(s.stored, "BF16", n, 0).double(), dtype="BF16")
        for n, s in enumerate(exact)
    ]
    assert len({f"{read(one).factor:.2g}" for one in taken}) > 1
    [(cause, words)] = told(taken)
    assert cause is Cause.scale
    assert words.startswith("all 8 merged weights: holds 2 times the delta: merged twice")
    halves = [sample(f"layers.{n}.q", factor=2.0 * (n % 2), seed=n) for n in range(8)]
    assert {cause for cause, _ in told(halves)} == {Cause.scale, Cause.not_merged}


def test_factors_that_mean_the_same_are_all_named() -> None:
    assert reasons(2.0, Scaling(8, 4, False, 8, 4)) == [
        "merged twice",
        "scaled by alpha / sqrt(rank), as for rslora, but the adapter is plain, alpha / rank",
    ]
    assert reasons(0.25, Scaling(16, 16, True, 16, 16)) == [
        "the scale was left out (alpha forgotten): B @ A was added as it is",
        "scaled by alpha / rank, but the adapter says rslora, alpha / sqrt(rank)",
    ]
    assert reasons(4.0, Scaling(2, 4, False, 8, 4)) == [
        "alpha was not divided by the rank",
        "alpha_pattern was left out",
    ]
    assert reasons(3.0, Scaling(8, 12, False, 8, 4)) == [
        "merged three times",
        "rank_pattern was left out of the scale",
    ]
    assert reasons(0.77, None) == ["a scale or weight that the recipe does not name"]


def test_of_several_reasons_the_one_that_more_weights_share_is_told() -> None:
    alphas = [(8.0, 4.0), (8.0, 1.0), (8.0, 16.0)]  # of the config, and of this weight
    taken = [
        replace(sample(f"layers.{n}.q", factor=usual / own, seed=n), scaling=Scaling(own, 4, False, usual, 4))
        for n, (usual, own) in enumerate(alphas)
    ]
    [(_, words)] = told(taken)
    assert words == "all 3 merged weights: holds 0.5 to 8 times the delta: alpha_pattern was left out"


@pytest.mark.parametrize("size", [1e-2, 2e-4])
def test_a_weight_of_which_a_part_was_merged_is_told_as_such(size: float) -> None:
    one = sample(size=size)
    columns = replace(one, stored=torch.cat([one.stored[:, :16], one.base[:, 16:]], 1))
    [(cause, words)] = told([columns])
    assert cause is Cause.partly
    assert re.match(
        r"w: the adapter was merged into a part only: 2[1-9](\.\d)? % of the values are base", words
    )


def test_names_say_what_became_of_the_weights() -> None:
    planned = {f"model.layers.{n}.q.weight": (4, 4) for n in range(6)}
    half = {name: shape for n, (name, shape) in enumerate(planned.items()) if n < 3}
    [words] = belongings.names(planned, half, {})
    assert words.startswith("3 of 6 weights are missing, of layers 3 to 5")
    codes = {**{f"{name}.absmax": (1,) for name in planned}, **planned}
    assert "the merge was quantized again" in belongings.names(planned, codes, {})[0]
    turned = {"a.weight": (3, 4)}
    assert belongings.names(turned, {"a.weight": (4, 3)}, {}) == ["a.weight is transposed"]


def test_a_config_that_another_loader_wrote_is_no_trouble() -> None:
    ours = {"rope_theta": 10000.0, "vocab_size": 8, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16"}
    theirs = {
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
        "vocab_size": 8,
        "dtype": "float32",
    }
    assert belongings.configs(ours, theirs, {"model.embed_tokens.weight": (8, 4)}, set()) == ([], [])


def test_a_tokenizer_that_lost_tokens_is_told() -> None:
    right = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>", "id": 1}]}
    [words] = belongings.tokenizers(right, {"model": {"vocab": {"a": 0}}}, (False, False)).faults
    assert words == "the tokenizer lacks 1 tokens that it should have, as '<x>'"
    assert belongings.tokenizers(right, None, (True, False)).notes == [
        "there is no tokenizer.json beside the weights",
        "the chat template is gone",
    ]
