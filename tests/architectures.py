"""Tiny models of the architectures that people merge, each with LoRA on all that it can be put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from peft import LoraConfig, PeftConfig
from torch import nn

from tests.beside_peft import Beside, Case

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tiny(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """A random model of a class of transformers, with the text sizes of all others."""

    def make() -> nn.Module:
        made: nn.Module = getattr(hf, model)(getattr(hf, config)(**{**TEXT, **options}))
        return made

    return make


def composed(
    config: str, model: str, text: dict[str, Any], vision: dict[str, Any], **options: Any
) -> Callable[[], nn.Module]:
    """The same for a model of text and images."""

    def make() -> nn.Module:
        told = getattr(hf, config)(
            text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **options
        )
        made: nn.Module = getattr(hf, model)(told)
        return made

    return make


def all_linear(**options: Any) -> Callable[[], PeftConfig]:
    """LoRA of rank 4 and scale 1.5 on every linear layer that is no head."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return lambda: LoraConfig(**{**defaults, **options})


def with_experts(*parameters: str) -> Callable[[], PeftConfig]:
    """The same, and on stacked experts."""
    return all_linear(target_parameters=list(parameters or EXPERTS))


MOE = Beside.delta_rounded

CASES: dict[str, Case] = {
    "Llama": Case(tiny("LlamaConfig", "LlamaForCausalLM"), all_linear()),
    "Llama, tied": Case(tiny("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True), all_linear()),
    "Qwen2": Case(tiny("Qwen2Config", "Qwen2ForCausalLM"), all_linear()),
    "Qwen3": Case(tiny("Qwen3Config", "Qwen3ForCausalLM", head_dim=8), all_linear()),
    "Phi-3": Case(tiny("Phi3Config", "Phi3ForCausalLM"), all_linear()),
    "Gemma 2": Case(tiny("Gemma2Config", "Gemma2ForCausalLM", head_dim=8), all_linear()),
    "GPT-2": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        all_linear(fan_in_fan_out=True),
    ),
    "BERT classifier": Case(
        tiny("BertConfig", "BertForSequenceClassification", num_labels=3),
        all_linear(task_type="SEQ_CLS", modules_to_save=["classifier"]),
    ),
    "Llama classifier": Case(
        tiny("LlamaConfig", "LlamaForSequenceClassification", num_labels=3),
        all_linear(task_type="SEQ_CLS"),
    ),
    "Mixtral": Case(tiny("MixtralConfig", "MixtralForCausalLM", num_local_experts=4), with_experts(), MOE),
    "Qwen2-MoE": Case(
        tiny("Qwen2MoeConfig", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=40, **MIXTURE),
        with_experts(),
        MOE,
    ),
    "Qwen3-MoE": Case(
        tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=8, **MIXTURE), with_experts(), MOE
    ),
    "OLMoE": Case(
        tiny("OlmoeConfig", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2), with_experts(), MOE
    ),
    "DeepSeek-V3": Case(
        tiny(
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            num_key_value_heads=4,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=12,
            q_lora_rank=20,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        with_experts(),
        MOE,
    ),
    "gpt-oss": Case(
        tiny("GptOssConfig", "GptOssForCausalLM", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        with_experts(),
        MOE,
    ),
    "Llama 4": Case(
        tiny(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            intermediate_size_mlp=56,
            num_local_experts=4,
            head_dim=8,
            interleave_moe_layer_step=1,
        ),
        all_linear(
            target_parameters=["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
            exclude_modules=["router"],  # PEFT cannot run LoRA on it
        ),
        MOE,
    ),
    "Gemma 3": Case(
        composed(
            "Gemma3Config",
            "Gemma3ForConditionalGeneration",
            {"head_dim": 8},
            {"vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        ),
        all_linear(),
    ),
    "Qwen2.5-VL": Case(
        composed(
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLForConditionalGeneration",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        ),
        all_linear(),
    ),
    "Mistral 3": Case(
        composed(
            "Mistral3Config",
            "Mistral3ForConditionalGeneration",
            {"model_type": "mistral", "head_dim": 8},
            {"model_type": "pixtral", "head_dim": 8},
            image_token_index=90,
        ),
        all_linear(),
    ),
}
