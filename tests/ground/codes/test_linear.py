"""Which weights are quantized: the rule of names and shapes beside what transformers itself would replace."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.ground.codes.encoders.linear import endings, is_linear, left_out

Shapes = dict[str, tuple[int, ...]]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}
EXPERTS: dict[str, Any] = {**SMALL, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SMALL,
    "LlamaForSequenceClassification": SMALL,
    "LlamaModel": SMALL,
    "MistralForCausalLM": SMALL,
    "Qwen2ForCausalLM": SMALL,
    "Qwen3ForCausalLM": SMALL,
    "Gemma2ForCausalLM": SMALL,
    "Phi3ForCausalLM": {**SMALL, "pad_token_id": 0},
    "MixtralForCausalLM": {**SMALL, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "OlmoeForCausalLM": EXPERTS,
    "BertModel": SMALL,
}


def made(name: str, config: dict[str, Any]) -> Any:
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**config))


def of_files(model: Any) -> Shapes:
    """The weights as `save_pretrained` writes them, without the copies of tied ones."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: torch.empty(t.shape, device="meta") for name, t in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def replaced(model: Any) -> set[str]:
    """The linear layers that bitsandbytes' quantizer of transformers replaces, by its own functions."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if should_convert_module(name, skipped) and (type(module) is nn.Linear or isinstance(module, Conv1D))
    }


@pytest.mark.parametrize("name", MODELS)
def test_what_bitsandbytes_would_take_of_a_model_is_taken_of_its_files(name: str) -> None:
    model = made(name, MODELS[name])
    files = of_files(model)
    wanted = replaced(model)
    if name == "BertModel":  # its last module, an ordinary layer, is skipped for being the last
        wanted |= {"pooler.dense.weight"}
    assert {n for n, shape in files.items() if is_linear(n, shape, experts=False)} == wanted & set(files)


@pytest.mark.parametrize("name", MODELS)
def test_a_loader_skips_what_was_left_and_nothing_that_was_taken(name: str) -> None:
    """By transformers' own matching of the names in the config."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = made(name, MODELS[name])
    files = of_files(model)
    taken = {n for n, shape in files.items() if is_linear(n, shape, experts=False)}
    modules = left_out(files.items(), taken)
    for listed in (modules, endings(modules, taken)):
        converted = {
            f"{n}.weight"
            for n, module in model.named_modules()
            if type(module) is nn.Linear and should_convert_module(n, listed)
        }
        assert converted == taken
    patterns = [re.escape(ending) for ending in endings(modules, taken)]
    assert not [n for n in taken if any(re.match(f".*{p}$", n.removesuffix(".weight")) for p in patterns)]


def test_experts_are_taken_where_a_file_holds_them_one_by_one_and_a_loader_folds_them() -> None:
    expert, shape = "model.layers.0.mlp.experts.3.up_proj.weight", (16, 32)
    assert is_linear(expert, shape, experts=True)
    assert not is_linear(expert, shape, experts=False)
    assert not is_linear("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 32), experts=True)
    assert left_out([(expert, shape)], set()) == ["lm_head", "model.layers.0.mlp.experts"]
    assert left_out([(expert, shape)], {expert}) == ["lm_head"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (64, 32)),
        ("transformer.wte.weight", (64, 32)),
        ("model.embed_positions.weight", (64, 32)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)),
        ("lm_head.weight", (64, 32)),
        ("model.norm.weight", (32,)),
        ("model.layers.0.mlp.gate.weight", (4, 32)),
        ("model.layers.0.block_sparse_moe.router.weight", (4, 32)),
        ("model.visual.patch_embed.proj.weight", (32, 3, 2, 14, 14)),
        ("backbone.layers.0.mixer.conv1d.weight", (64, 1, 4)),
        ("backbone.layers.0.mixer.A_log", (64, 16)),
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
    ],
)
def test_what_is_no_linear_layer_is_left(name: str, shape: tuple[int, ...]) -> None:
    assert not is_linear(name, shape, experts=True)


def test_an_ending_that_would_skip_more_is_written_in_full() -> None:
    modules = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.visual.proj"]
    assert endings(modules, ["model.layers.0.mlp.up.weight"]) == ["mlp.gate", "model.visual.proj"]
    assert endings(["a.0.mlp.gate"], ["b.mlp.gate.weight"]) == ["a.0.mlp.gate"]
