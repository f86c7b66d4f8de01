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
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from pipeline.ground.canonical_names import canonical
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
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
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
    return {
        "vision_config": VISION | {"model_type": vision},
        "text_config": TEXT | {"model_type": text},
        **config,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", TEXT),
    "Qwen2ForCausalLM": ("Qwen2Config", TEXT),
    "Phi3ForCausalLM": ("Phi3Config", TEXT),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16, "n_positions": 16}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "Dinov2ForImageClassification": ("Dinov2Config", VISION),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", TEXT | {"head_dim": 4}),
    "Gemma3ForConditionalGeneration": ("Gemma3Config", vlm("siglip_vision_model", "gemma3_text", mm_tokens_per_image=4)),
    "PaliGemmaForConditionalGeneration": ("PaliGemmaConfig", vlm("siglip_vision_model", "gemma", projection_dim=8)),
    "LlavaForConditionalGeneration": ("LlavaConfig", vlm("clip_vision_model", "llama")),
    "LlavaNextForConditionalGeneration": ("LlavaNextConfig", vlm("clip_vision_model", "llama")),
    "Mistral3ForConditionalGeneration": ("Mistral3Config", vlm("pixtral", "mistral")),
    "Qwen2VLForConditionalGeneration": ("Qwen2VLConfig", {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "patch_size": 4},
    }),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VLConfig", {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": {"depth": 1, "hidden_size": 8, "out_hidden_size": 8, "num_heads": 2, "intermediate_size": 12},
    }),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 10}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 4, "mlp_only_layers": [0]}),
    "OlmoeForCausalLM": ("OlmoeConfig", EXPERTS),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DEEPSEEK),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", DEEPSEEK | {"head_dim": 4}),
    "MixtralForCausalLM": ("MixtralConfig", MOE),
    "PhimoeForCausalLM": ("PhimoeConfig", MOE),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", MOE),
    "JambaForCausalLM": ("JambaConfig", TEXT | {
        "num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }),
    "NemotronHForCausalLM": ("NemotronHConfig", TEXT | {
        "layers_block_type": ["attention", "moe"], "n_routed_experts": 3, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 6, "head_dim": 4,
    }),
    "Lfm2MoeForCausalLM": ("Lfm2MoeConfig", EXPERTS | {
        "num_dense_layers": 1, "layer_types": ["full_attention", "full_attention"],
    }),
    "GptOssForCausalLM": ("GptOssConfig", MOE | {"head_dim": 4, "layer_types": ["full_attention"] * 2}),
    "Llama4ForCausalLM": ("Llama4TextConfig", MOE | {
        "head_dim": 4, "intermediate_size_mlp": 10, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1],
    }),
}  # fmt: skip


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
            found = sum(taken(value, files[site.weight], site)[0].numel() for site in sites)
            assert found == (value.numel() if sites else 0)
        # Only a head has no counterpart, and only in the bare model.
        bare = {weight for weight, count in used.items() if count != files[weight].numel()}
        assert not bare or adapter is of.bare and bare.isdisjoint(of.bare)


def test_the_samples_have_two_layouts_where_files_differ_from_memory() -> None:
    differing = {name for name in MODELS if set(sample(name).files) != set(sample(name).memory)}
    assert len(differing) >= 18
    prefixed = [
        n for n in MODELS if any(isinstance(t, PrefixChange) for t in sample(n).model._weight_conversions)
    ]
    assert any("vision_tower.vision_model." in weight for n in prefixed for weight in sample(n).first_files)
    assert not {"LlamaForCausalLM", "Phi3ForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"} & differing
