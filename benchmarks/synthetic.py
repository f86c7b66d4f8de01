# ruff: noqa: T201
"""Writes a Llama checkpoint of random weights and a LoRA adapter for it: `synthetic.py FOLDER [--layers 16]`.

The default is the shape of Llama-3.2-1B: hidden 2048, 16 layers, vocabulary 128256, tied embeddings, bf16,
2.5 GB; the adapter has rank 16 on all linear layers, float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    a = parser.parse_args()
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * std).to(dtype)

    head = a.hidden // a.heads
    linear = {
        "self_attn.q_proj": (a.hidden, a.hidden),
        "self_attn.k_proj": (a.kv_heads * head, a.hidden),
        "self_attn.v_proj": (a.kv_heads * head, a.hidden),
        "self_attn.o_proj": (a.hidden, a.hidden),
        "mlp.gate_proj": (a.intermediate, a.hidden),
        "mlp.up_proj": (a.intermediate, a.hidden),
        "mlp.down_proj": (a.hidden, a.intermediate),
    }
    base, lora = {"model.embed_tokens.weight": normal(a.vocab, a.hidden)}, {}
    for layer in range(a.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.ones(a.hidden, dtype=torch.bfloat16)
        for name, (rows, columns) in linear.items():
            module = f"model.layers.{layer}.{name}"
            base[f"{module}.weight"] = normal(rows, columns)
            key = f"base_model.model.{module}"
            lora[f"{key}.lora_A.weight"] = normal(a.rank, columns, std=0.01, dtype=torch.float32)
            lora[f"{key}.lora_B.weight"] = normal(rows, a.rank, std=0.01, dtype=torch.float32)
    base["model.norm.weight"] = torch.ones(a.hidden, dtype=torch.bfloat16)
    (a.folder / "base").mkdir(parents=True, exist_ok=True)
    (a.folder / "adapter").mkdir(exist_ok=True)
    save_file(base, a.folder / "base" / "model.safetensors", {"format": "pt"})
    save_file(lora, a.folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": a.hidden,
        "intermediate_size": a.intermediate, "num_hidden_layers": a.layers, "vocab_size": a.vocab,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": head,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 500000.0,
    }  # fmt: skip
    adapter_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": a.rank, "lora_alpha": 2 * a.rank,
        "target_modules": [name.rpartition(".")[2] for name in linear], "bias": "none",
        "base_model_name_or_path": "synthetic", "inference_mode": True, "lora_dropout": 0.0,
        "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    (a.folder / "base" / "config.json").write_text(json.dumps(config, indent=2))
    (a.folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))
    print(f"{a.folder}: {sum(t.numel() for t in base.values()):,} parameters")


if __name__ == "__main__":
    main()
