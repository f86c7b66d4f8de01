"""The second map of names beside the layouts that transformers writes, as the first is tested."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.errors import Refused
from pipeline.ground.module_names import Names
from pipeline.ground.retraced.weights import Place, Weights
from tests.ground.test_module_names import (
    ALIKE,
    APART,
    GEMMA3,
    GPT_OSS,
    GPT_OSS_APART,
    MODELS,
    MOE_LAYER,
    Layout,
    sample,
    shapes,
    weight_names,
)


def weights_of(layout: Layout, model_type: str | None) -> Weights:
    return Weights({name: tuple(value.shape) for name, value in layout.items()}, model_type, {})


def found(weights: Weights, name: str, value: Tensor) -> list[Place]:
    module, _, parameter = name.rpartition(".")
    stack = value.ndim == 3 and parameter not in ("weight", "bias")
    return weights.find(module, parameter, stack=stack)


def on_both_sides(parameter: Tensor, weight: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The rows of the parameter that the place means, and what lies there."""
    matrix = parameter.reshape(place.matrix)
    rows = matrix[slice(*place.rows)]
    lying = weight.reshape(-1, weight.shape[-1]) if weight.ndim > 1 else weight.reshape(1, -1)
    fold = max(matrix.shape[1] // lying.shape[1], 1)
    there = lying[place.row :][: len(rows) * fold, place.column :]
    return rows.reshape(-1), there[:, : rows.shape[1] // fold].reshape(-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_of_any_era_lies_where_its_numbers_are_in_files_of_any_era(name: str) -> None:
    of = sample(name)
    layouts = {tuple(layout): layout for layout in (of.memory, of.files, of.first_files, of.bare)}
    for files, adapter in product(layouts.values(), repeat=2):
        weights, taken = weights_of(files, of.model.config.model_type), dict.fromkeys(files, 0)
        for parameter, value in adapter.items():
            places = found(weights, parameter, value)
            for place in places:
                ours, theirs = on_both_sides(value, files[place.weight], place)
                assert torch.equal(ours, theirs), (parameter, place)
                taken[place.weight] += ours.numel()
            assert places or files is of.bare, parameter  # which has no head
        if adapter is not of.bare:
            assert taken == {weight: value.numel() for weight, value in files.items()}


@pytest.mark.parametrize(("adapter", "files"), list(product(range(3), repeat=2)))
def test_the_three_eras_of_gemma3_find_each_other(adapter: int, files: int) -> None:
    weights = Weights({row[files]: (2, 2) for row in GEMMA3}, "gemma3", {})
    for row in GEMMA3:
        module, _, parameter = row[adapter].rpartition(".")
        assert [place.weight for place in weights.find(module, parameter)] == [row[files]]


def test_what_two_weights_answer_to_is_left_open() -> None:
    shapes = {f"{tower}.layers.0.mlp.up_proj.weight": (2, 2) for tower in ("model", "language_model")}
    assert Weights(dict(shapes), None, {}).find("layers.0.mlp.up_proj", "weight") == []
    renamed = Weights(dict(shapes), None, {"layers": "model.layers"})
    [place] = renamed.find("layers.0.mlp.up_proj", "weight")
    assert place.weight == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("features", "model_type", "lies"),
    [
        ((12, 8), "mixtral", False),
        ((8, 12), "mixtral", True),
        ((8, 8), "llama4", True),
        ((8, 8), "jamba", False),
    ],
)
def test_one_experts_module_lies_in_the_stack_as_its_sizes_or_the_model_tell(
    features: tuple[int, int], model_type: str, lies: bool
) -> None:
    shape = (3, 12, 8) if features != (8, 8) else (3, 8, 8)
    weights = Weights({"model.layers.0.mlp.experts.down_proj": shape}, model_type, {})
    [place] = weights.find("model.layers.0.mlp.experts.1.down_proj", "weight", features)
    assert (place.turned, place.row, place.dims) == (lies, shape[1], shape[1:])


@pytest.mark.parametrize(("asked", "held"), ALIKE)
def test_eras_and_depths_of_nesting_are_one_name(asked: str, held: str) -> None:
    others = {"model.visual.blocks.0.attn.qkv.weight": (2, 2), "mtp.layers.0.mlp.up_proj.weight": (2, 2)}
    assert names_found({held: (2, 2), **others}, asked) == [held]


@pytest.mark.parametrize(("asked", "held"), APART)
def test_what_means_something_else_is_not_found(asked: str, held: str) -> None:
    shape = (4, 6, 8) if "experts" in held and not held.endswith(".weight") else (6, 8)
    assert names_found({held: shape}, asked) == []


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize(("kind", "ending"), [("weight", ""), ("bias", "_bias")])
def test_gpt_oss_from_bitsandbytes_days_finds_its_expert(projection: str, kind: str, ending: str) -> None:
    fused = f"{MOE_LAYER}.{projection}_proj{ending}"
    apart = [f"{MOE_LAYER}.{projection}_projs.{e}.{kind}" for e in range(2)]
    assert [names_found(GPT_OSS, name) for name in apart] == [[fused], [fused]]
    assert names_found(GPT_OSS_APART, fused) == (apart if kind == "weight" else [])
    assert names_found(GPT_OSS, f"{MOE_LAYER}.{projection}_projs.2.{kind}") == []


def names_found(held: dict[str, tuple[int, ...]], asked: str) -> list[str]:
    module, _, parameter = asked.rpartition(".")
    return [place.weight for place in Weights(dict(held), None, {}).find(module, parameter)]


@given(held=st.dictionaries(weight_names, shapes, max_size=8), asked=weight_names)
def test_both_maps_agree_on_what_they_find(held: dict[str, tuple[int, ...]], asked: str) -> None:
    module, _, parameter = asked.rpartition(".")
    try:
        first = [site.weight for site in Names(held).find(module, parameter)]
    except Refused:
        return
    assert names_found(held, asked) == first
