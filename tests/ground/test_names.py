"""What patterns mean, and PEFT's own way of finding a module's pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from pipeline.ground.deltas.lora_family import scaling
from pipeline.ground.deltas.patterns import pattern_value
from pipeline.ground.names import matches, unmatched

LAYER = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "module", "means"),
    [
        ("q_proj", LAYER, True),
        ("self_attn", LAYER, True),
        ("self_attn.q_proj", LAYER, True),
        ("*_proj", LAYER, True),
        ("layers.*.self_attn", LAYER, True),
        ("layers.1", LAYER, False),
        ("layers.10", LAYER, True),
        ("proj", LAYER, False),
        ("norm", "model.layers.0.input_layernorm", False),
        ("norm", "model.norm", True),
        ("re:.*q_proj", LAYER, True),
        ("re:q_proj", LAYER, False),
        (LAYER, LAYER, True),
        ("lm_head", LAYER, False),
    ],
)
def test_patterns_mean_whole_components(pattern: str, module: str, means: bool) -> None:
    assert matches(module, pattern) is means


def test_unmatched_lists_what_no_pattern_means() -> None:
    assert unmatched(["a.q", "a.k", "b.q"], ["q"]) == ["a.k"]


parts = st.sampled_from(["model", "layers", "0", "1", "10", "self_attn", "q_proj", "k_proj", "mlp"])
modules = st.lists(parts, min_size=1, max_size=5).map(".".join)
patterns = st.one_of(
    modules, st.sampled_from([".*q_proj", "^model", r"layers\.1\..*", "q_proj|k_proj", "layers.1"])
)


@given(module=modules, alphas=st.dictionaries(patterns, st.integers(1, 64), max_size=4),
       ranks=st.dictionaries(patterns, st.integers(1, 64), max_size=4), rslora=st.booleans())  # fmt: skip
def test_ranks_and_scaling_are_pefts(
    module: str, alphas: dict[str, int], ranks: dict[str, int], rslora: bool
) -> None:
    config = {"r": 7, "lora_alpha": 5, "alpha_pattern": alphas, "rank_pattern": ranks, "use_rslora": rslora}
    alpha = alphas.get(get_pattern_key(alphas, module), 5)
    rank = ranks.get(get_pattern_key(ranks, module), 7)
    assert pattern_value(module, ranks, 7) == rank
    assert scaling(module, config, rank) == (alpha / rank**0.5 if rslora else alpha / rank)
