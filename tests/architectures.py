"""Tiny models of the architectures that people merge, each with LoRA on all that it can be put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from peft import LoraConfig, PeftConfig
from torch import nn

from tests.beside_peft import Beside, Case, written_by_file_names

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FEED_FORWARD = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
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
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_TOKENS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
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

ASKED: dict[str, Case] = {
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
            target_parameters=FEED_FORWARD,
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
            {"rope_parameters": MROPE},
            {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
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
MORE: dict[str, Case] = {
    "GLM-4 MoE": Case(
        tiny(
            "Glm4MoeConfig",
            "Glm4MoeForCausalLM",
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            head_dim=8,
            num_experts_per_tok=2,
        ),
        with_experts(),
        MOE,
    ),
    "ERNIE 4.5 MoE": Case(
        tiny(
            "Ernie4_5_MoeConfig",
            "Ernie4_5_MoeForCausalLM",
            moe_intermediate_size=24,
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        with_experts(),
        MOE,
    ),
    "Jamba": Case(
        tiny(
            "JambaConfig",
            "JambaForCausalLM",
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        with_experts(*FEED_FORWARD),
        MOE,
    ),
    "LFM2-MoE": Case(
        tiny(
            "Lfm2MoeConfig",
            "Lfm2MoeForCausalLM",
            num_dense_layers=1,
            layer_types=["conv", "full_attention"],
            **MIXTURE,
        ),
        with_experts(*FEED_FORWARD),
        MOE,
    ),
    "Qwen3-Next": Case(
        tiny(
            "Qwen3NextConfig",
            "Qwen3NextForCausalLM",
            shared_expert_intermediate_size=24,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            **MIXTURE,
        ),
        with_experts(),
        MOE,
    ),
    "MiniMax": Case(
        tiny(
            "MiniMaxConfig",
            "MiniMaxForCausalLM",
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        with_experts(),
        MOE,
    ),
    "Qwen3-VL-MoE": Case(
        composed(
            "Qwen3VLMoeConfig",
            "Qwen3VLMoeForConditionalGeneration",
            {"head_dim": 8, "rope_parameters": MROPE, **MIXTURE},
            {
                "depth": 2,
                "num_heads": 4,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **QWEN_TOKENS,
        ),
        with_experts(),
        MOE,
    ),
    "LLaVA": Case(
        composed(
            "LlavaConfig",
            "LlavaForConditionalGeneration",
            {"model_type": "llama"},
            {"model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=90,
        ),
        all_linear(),
    ),
    "PaliGemma": Case(
        composed(
            "PaliGemmaConfig",
            "PaliGemmaForConditionalGeneration",
            {"model_type": "gemma", "head_dim": 8},
            {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=90,
            projection_dim=32,
        ),
        all_linear(),
    ),
    "Falcon": Case(tiny("FalconConfig", "FalconForCausalLM"), all_linear()),
    "OPT": Case(tiny("OPTConfig", "OPTForCausalLM", ffn_dim=40, word_embed_proj_dim=32), all_linear()),
    "GPT-NeoX": Case(tiny("GPTNeoXConfig", "GPTNeoXForCausalLM"), all_linear()),
    "T5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=96)
        ),
        all_linear(task_type="SEQ_2_SEQ_LM"),
    ),
    "Whisper": Case(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=40,
                decoder_ffn_dim=40,
                vocab_size=96,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        all_linear(task_type=None),
    ),
    "ViT": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)),
        all_linear(task_type=None, modules_to_save=["classifier"]),
    ),
}
BY_FILE_NAMES: dict[str, Case] = {
    "Mixtral, experts by file names": Case(
        ASKED["Mixtral"].make,
        all_linear(target_modules=["q_proj"]),
        MOE,
        rewrite=written_by_file_names(
            r".*\.block_sparse_moe\.(experts\.\d+\.w[123]|gate)", target_modules=["w1", "w2", "w3", "gate"]
        ),
    ),
    "OLMoE, experts by file names": Case(
        ASKED["OLMoE"].make,
        all_linear(target_modules=["q_proj"]),
        MOE,
        rewrite=written_by_file_names(
            r".*\.mlp\.(experts\.\d+\.(gate|up|down)_proj|gate)",
            target_modules=["gate_proj", "up_proj", "down_proj", "gate"],
        ),
    ),
}
CASES: dict[str, Case] = {**ASKED, **MORE, **BY_FILE_NAMES}
