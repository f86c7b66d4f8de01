"""Adapters find their weights in files of every layout, judged by transformers' own conversions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from pipeline.ground.errors import Refused
from pipeline.ground.module_names import Names, Site

Layout = Mapping[str, Tensor]

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BERT = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MOE = TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2}
EXPERTS = TEXT | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
DEEPSEEK = TEXT | {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


def vlm(vision: str, text: str, **config: Any) -> dict[str, Any]:
    towers = {"vision_config": VISION | {"model_type": vision}, "text_config": TEXT | {"model_type": text}}
    return towers | config


GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16, "n_positions": 16}
QWEN2_VISION = {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "patch_size": 4}
QWEN25_VISION = {"depth": 1, "hidden_size": 8, "out_hidden_size": 8, "num_heads": 2, "intermediate_size": 12}
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
}
ATTENTION = ["full_attention", "full_attention"]
JAMBA = TEXT | {
    "num_experts": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
NEMOTRON = TEXT | {
    "layers_block_type": ["attention", "moe"],
    "head_dim": 4,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 6,
}
LLAMA4 = MOE | {
    "head_dim": 4,
    "intermediate_size_mlp": 10,
    "layer_types": ATTENTION,
    "no_rope_layers": [1, 1],
}

# Class: its config and the config's settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", TEXT),
    "Qwen2ForCausalLM": ("Qwen2Config", TEXT),
    "Phi3ForCausalLM": ("Phi3Config", TEXT),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "Dinov2ForImageClassification": ("Dinov2Config", VISION),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", TEXT | {"head_dim": 4}),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        vlm("siglip_vision_model", "gemma3_text", mm_tokens_per_image=4),
    ),
    "PaliGemmaForConditionalGeneration": (
        "PaliGemmaConfig",
        vlm("siglip_vision_model", "gemma", projection_dim=8),
    ),
    "LlavaForConditionalGeneration": ("LlavaConfig", vlm("clip_vision_model", "llama")),
    "LlavaNextForConditionalGeneration": ("LlavaNextConfig", vlm("clip_vision_model", "llama")),
    "Mistral3ForConditionalGeneration": ("Mistral3Config", vlm("pixtral", "mistral")),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {"text_config": QWEN_TEXT, "vision_config": QWEN2_VISION},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {"text_config": QWEN_TEXT, "vision_config": QWEN25_VISION},
    ),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 10}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 4, "mlp_only_layers": [0]}),
    "OlmoeForCausalLM": ("OlmoeConfig", EXPERTS),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DEEPSEEK),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", DEEPSEEK | {"head_dim": 4}),
    "MixtralForCausalLM": ("MixtralConfig", MOE),
    "PhimoeForCausalLM": ("PhimoeConfig", MOE),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", MOE),
    "JambaForCausalLM": ("JambaConfig", JAMBA),
    "NemotronHForCausalLM": ("NemotronHConfig", NEMOTRON),
    "Lfm2MoeForCausalLM": ("Lfm2MoeConfig", EXPERTS | {"num_dense_layers": 1, "layer_types": ATTENTION}),
    "GptOssForCausalLM": ("GptOssConfig", MOE | {"head_dim": 4, "layer_types": ATTENTION}),
    "Llama4ForCausalLM": ("Llama4TextConfig", LLAMA4),
}


@dataclass(frozen=True)
class Sample:
    """A tiny model whose every element is another number, and its layouts."""

    model: Any
    memory: Layout
    files: Layout  # as save_pretrained writes it
    first_files: Layout  # with the prefixes that only older files have
    bare: Layout  # of the base model without a head


@cache
def sample(name: str) -> Sample:
    config, options = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    count = 0
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(count, count + parameter.numel(), dtype=torch.float64)
            parameter.data = numbers.reshape(parameter.shape)
            count += parameter.numel()
    memory = dict(model.named_parameters())
    files = revert_weight_conversion(model, memory)
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    first_files = revert_weight_conversion(model, memory)
    bare = dict(model.base_model.named_parameters())
    return Sample(model, memory, files, first_files, bare)


def names_of(layout: Layout) -> Names:
    return Names({name: tuple(value.shape) for name, value in layout.items()})


def find(names: Names, name: str) -> tuple[Site, ...]:
    module, _, parameter = name.rpartition(".")
    return names.find(module, parameter)


def taken(parameter: Tensor, weight: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """What the site says is the same: on the parameter's side, and on the weight's."""
    sides = [parameter, weight]
    if site.matrix is not None:
        fused = 0 if parameter.ndim > weight.ndim else 1
        sides[fused] = sides[fused][site.matrix].chunk(site.parts)[site.part]
    else:
        assert (site.part, site.parts) == (0, 1)
    return sides[0], sides[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_found_in_the_files_that_transformers_reads_it_from(name: str) -> None:
    of = sample(name)
    for files in (of.files, of.first_files):
        transforms = get_model_conversion_mapping(of.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix, meta, names = of.model.base_model_prefix, dict(of.memory), names_of(files)
        sources: dict[str, set[str]] = {parameter: set() for parameter in of.memory}
        for weight in files:
            loaded, _ = rename_source_key(weight, renamings, converters, prefix, meta)
            sources[loaded].add(weight)
        for parameter, weights in sources.items():
            assert {site.weight for site in find(names, parameter)} == weights


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_any_era_finds_equal_values_in_files_of_any_era(name: str) -> None:
    of = sample(name)
    layouts = {tuple(layout): layout for layout in (of.memory, of.files, of.first_files, of.bare)}
    for files, adapter in product(layouts.values(), repeat=2):
        names, used = names_of(files), dict.fromkeys(files, 0)
        for parameter, value in adapter.items():
            sites = find(names, parameter)
            for site in sites:
                ours, theirs = taken(value, files[site.weight], site)
                assert torch.equal(ours, theirs), (parameter, site)
                used[site.weight] += ours.numel()
            assert sites or files is of.bare, parameter  # which has no head
            found = sum(taken(value, files[site.weight], site)[0].numel() for site in sites)
            assert found == (value.numel() if sites else 0)
        if adapter is not of.bare:
            assert used == {weight: value.numel() for weight, value in files.items()}


def test_the_samples_have_files_that_differ_from_memory() -> None:
    of = {name: sample(name) for name in MODELS}
    same = {
        name for name in MODELS if set(of[name].files) == set(of[name].first_files) == set(of[name].memory)
    }
    assert {"LlamaForCausalLM", "Phi3ForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"} <= same
    assert len(MODELS) - len(same) >= 18
    for name in ("Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"):
        assert any("vision_tower.vision_model." in weight for weight in of[name].first_files)


# One layer of Gemma 3 in the three eras of transformers (before 4.52, to 4.57, from 5.0) and in its files,
# which have the names of the first era.
GEMMA3 = [
    (
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ),
    (
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    ),
    ("language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"),
    (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.bias",
    ),
    (
        "vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.post_layernorm.weight",
    ),
    (
        "multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_input_projection_weight",
    ),
]


@pytest.mark.parametrize(("adapter", "files"), list(product(range(3), repeat=2)))
def test_the_three_eras_of_gemma3_find_each_other(adapter: int, files: int) -> None:
    names = Names({row[files]: (2, 2) for row in GEMMA3})
    for row in GEMMA3:
        assert find(names, row[adapter]) == (Site(row[files]),)


ALIKE = [
    ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
    ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("model.language_model.model.norm.weight", "language_model.model.norm.weight"),
    ("model.image_newline", "image_newline"),
    ("thinker.model.language_model.layers.0.mlp.gate.weight", "thinker.model.layers.0.mlp.gate.weight"),
    ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
    ("transformer.h.0.attn.c_attn.bias", "h.0.attn.c_attn.bias"),
    ("model.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"),
    ("backbone.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.in_proj.weight"),
    ("encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.gamma"),
    ("bert.encoder.layer.0.output.LayerNorm.bias", "encoder.layer.0.output.LayerNorm.beta"),
    ("lm_head.weight", "embed_out.weight"),
    ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.router.gate.weight"),
    ("layers.0.mlp.experts.gate_up_proj", "language_model.model.layers.0.mlp.experts.fc1.weight"),
    ("layers.0.mlp.experts.down_proj", "language_model.model.layers.0.mlp.experts.fc2.weight"),
    ("model.layers.0.mlp.experts.1.w2.weight", "model.layers.0.block_sparse_moe.experts.1.w2.weight"),
    ("model.layers.0.mlp.experts.1.w3.weight", "model.layers.0.mlp.experts.1.up_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "held"), ALIKE)
def test_eras_and_depths_of_nesting_are_one_name(asked: str, held: str) -> None:
    others = {"model.visual.blocks.0.attn.qkv.weight": (2, 2), "mtp.layers.0.mlp.up_proj.weight": (2, 2)}
    assert find(Names({held: (2, 2), **others}), asked) == (Site(held),)


APART = [
    ("model.layers.0.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.shared_expert.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"),
    ("model.layers.0.self_attn.q_proj.weight", "model.decoder.layers.0.self_attn.q_proj.weight"),
    ("encoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "talker.model.layers.0.self_attn.q_proj.weight"),
    ("model.encoder.layers.0.fc1.weight", "vision_tower.encoder.layers.0.fc1.weight"),
    ("text_model.encoder.layers.0.fc1.weight", "vision_model.encoder.layers.0.fc1.weight"),
    ("bert.encoder.layer.0.output.dense.weight", "roberta.encoder.layer.0.output.dense.weight"),
    ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate.weight"),
    ("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.1.gate_proj.weight"),
    ("model.layers.0.mlp.experts.4.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"),
    ("model.layers.0.mlp.experts.0.up_proj.bias", "model.layers.0.mlp.experts.gate_up_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "held"), APART)
def test_what_means_something_else_is_not_found(asked: str, held: str) -> None:
    shape = (4, 6, 8) if "experts" in held and not held.endswith(".weight") else (6, 8)
    assert find(Names({held: shape}), asked) == ()


def test_a_tensor_of_another_rank_is_not_the_fused_experts() -> None:
    assert (
        find(Names({"layers.0.mlp.experts.down_proj": (6, 8)}), "layers.0.mlp.experts.1.down_proj.weight")
        == ()
    )


def test_a_prefix_is_no_matter_of_depth_where_the_files_have_both_stacks() -> None:
    held = ["layers.0.output.dense.weight", "vit.layers.1.output.dense.weight"]
    names = Names(dict.fromkeys(held, (2, 2)))
    assert find(names, "model.layers.0.output.dense.weight") == (Site(held[0]),)
    assert find(names, "model.layers.1.output.dense.weight") == ()
    assert find(names, "model.vit.layers.1.output.dense.weight") == (Site(held[1]),)


def test_a_name_that_the_files_have_is_that_weight_whatever_else_might_answer() -> None:
    held = ["model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"]
    names = Names(dict.fromkeys(held, (2, 2)))
    assert [find(names, name) for name in held] == [(Site(name),) for name in held]


def test_renames_come_first_and_take_whole_components() -> None:
    held = "talker.model.layers.0.mlp.up_proj.weight"
    names = Names({held: (2, 2)}, {"model": "talker"})
    assert find(names, "model.layers.0.mlp.up_proj.weight") == (Site(held),)
    assert find(names, "models.layers.0.mlp.up_proj.weight") == ()


def refusal(names: Names, asked: str) -> str:
    with pytest.raises(Refused) as refused:
        find(names, asked)
    [sentence] = refused.value.sentences
    return sentence


def test_two_weights_that_answer_alike_are_refused_by_name() -> None:
    held = ["layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"]
    assert refusal(Names(dict.fromkeys(held, (2, 2))), "model.layers.0.mlp.up_proj.weight") == (
        "adapter: 'model.layers.0.mlp.up_proj.weight' could mean "
        "language_model.model.layers.0.mlp.up_proj.weight or layers.0.mlp.up_proj.weight; "
        "names={from: to} says which"
    )


def test_a_layer_that_only_one_of_two_like_stacks_has_is_refused_too() -> None:
    held = ["layers.0.mlp.up_proj.weight", "language_model.model.layers.1.mlp.up_proj.weight"]
    assert refusal(Names(dict.fromkeys(held, (2, 2))), "model.layers.1.mlp.up_proj.weight") == (
        "adapter: 'model.layers.1.mlp.up_proj.weight' could mean a module of language_model.model.layers or "
        "a module of layers; names={from: to} says which"
    )


def test_experts_both_fused_and_apart_are_refused() -> None:
    held: dict[str, tuple[int, ...]] = {"model.layers.0.mlp.experts.gate_up_proj": (1, 6, 4)}
    for half in ("gate", "up"):
        held[f"model.layers.0.mlp.experts.0.{half}_proj.weight"] = (3, 4)
    for asked in ("layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.0.up_proj.weight"):
        assert "could mean" in refusal(Names(held), asked)


MOE_LAYER = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [
        ("1.w1", "the base lacks gate_proj of expert 1"),
        ("2.w3", "the base lacks up_proj of expert 2"),
        ("0.w3", "the base lacks up_proj of expert 0"),
    ],
)
def test_a_fused_delta_needs_all_experts(lacks: str, sentence: str) -> None:
    held = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (2, 2)
        for e in range(3)
        for w in ("w1", "w3")
    }
    del held[f"model.layers.0.block_sparse_moe.experts.{lacks}.weight"]
    assert sentence in refusal(Names(held), f"{MOE_LAYER}.gate_up_proj")


def test_experts_apart_answer_by_expert_and_then_part() -> None:
    held = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (2, 2)
        for e in (1, 0)
        for w in ("w3", "w1")
    }
    of = "model.layers.0.block_sparse_moe.experts"
    assert find(Names(held), f"{MOE_LAYER}.gate_up_proj") == (
        Site(f"{of}.0.w1.weight", 0, 0, 2),
        Site(f"{of}.0.w3.weight", 0, 1, 2),
        Site(f"{of}.1.w1.weight", 1, 0, 2),
        Site(f"{of}.1.w3.weight", 1, 1, 2),
    )


GPT_OSS = {
    f"{MOE_LAYER}.gate_up_proj": (2, 4, 6),
    f"{MOE_LAYER}.gate_up_proj_bias": (2, 6),
    f"{MOE_LAYER}.down_proj": (2, 3, 4),
    f"{MOE_LAYER}.down_proj_bias": (2, 4),
}
GPT_OSS_APART = {
    f"{MOE_LAYER}.{projection}_projs.{e}.{kind}": (2, 2)[: 1 + (kind == "weight")]
    for projection in ("gate_up", "down")
    for e in range(2)
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize(("kind", "ending"), [("weight", ""), ("bias", "_bias")])
def test_gpt_oss_from_bitsandbytes_days_finds_its_expert(projection: str, kind: str, ending: str) -> None:
    fused = f"{MOE_LAYER}.{projection}_proj{ending}"
    apart = [f"{MOE_LAYER}.{projection}_projs.{e}.{kind}" for e in range(2)]
    for e, name in enumerate(apart):
        assert find(Names(GPT_OSS), name) == (Site(fused, e),)
    assert find(Names(GPT_OSS_APART), fused) == (Site(apart[0], 0), Site(apart[1], 1))
    assert find(Names(GPT_OSS), f"{MOE_LAYER}.{projection}_projs.2.{kind}") == ()


def test_gate_and_up_of_experts_with_biases_are_not_cut_in_halves() -> None:
    apart = {
        f"{MOE_LAYER}.0.{half}_proj.{kind}": (2, 2) for half in ("gate", "up") for kind in ("weight", "bias")
    }
    assert "differ in whether gate and up are one weight" in refusal(
        Names(GPT_OSS), f"{MOE_LAYER}.0.up_proj.weight"
    )
    assert "differ in whether gate and up are one weight" in refusal(
        Names(apart), f"{MOE_LAYER}.gate_up_proj"
    )
    assert find(Names(apart), f"{MOE_LAYER}.gate_up_proj_bias") == ()


COMPONENTS = """
    model language_model vision_tower vision_model bert transformer encoder layer layers h 0 1 12
    mlp block_sparse_moe router gate experts w1 w2 w3 gate_proj up_proj gate_up_proj down_proj gate_up_projs
    attention self query output dense LayerNorm input_linear
"""
words = st.sampled_from(COMPONENTS.split())
last_words = st.sampled_from(
    ["weight", "bias", "gamma", "beta", "gate_up_proj", "down_proj", "gate_up_proj_bias", "probe"]
)
weight_names = st.builds(lambda path, last: ".".join([*path, last]), st.lists(words, max_size=7), last_words)
shapes = st.sampled_from([(2,), (2, 4), (2, 4, 6), (13, 4, 6)])


@given(held=st.dictionaries(weight_names, shapes, max_size=8))
def test_every_weight_is_found_by_its_own_name(held: dict[str, tuple[int, ...]]) -> None:
    names = Names(held)
    assert all(find(names, name) == (Site(name),) for name in held)


def kind(name: str) -> str:
    last = name.rpartition(".")[2]
    if last.endswith("bias") or last == "beta":
        return "bias"
    return last if last == "probe" else "weight"


def numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


@given(held=st.dictionaries(weight_names, shapes, max_size=8), asked=weight_names)
def test_nothing_is_found_in_another_layer_expert_or_kind(
    held: dict[str, tuple[int, ...]], asked: str
) -> None:
    try:
        sites = find(Names(held), asked)
    except Refused:
        return
    for site in sites:
        assert kind(site.weight) == kind(asked)
        expert = [] if site.matrix is None else [site.matrix]
        assert numbers(asked) in (numbers(site.weight), numbers(site.weight) + expert) or (
            numbers(asked) + expert == numbers(site.weight)
        )


def test_names_are_found_without_torch_or_transformers() -> None:
    code = (
        "import sys; from pipeline.ground.module_names import Names; Names({'a.weight': ()}).find('a', 'b'); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
