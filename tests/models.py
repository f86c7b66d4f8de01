"""Tiny models and adapters, made by transformers and PEFT: what our files are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_llama(
    folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB", **config: Any
) -> Path:
    """A random Llama of two layers, saved by transformers."""
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def write_lora(
    folder: Path, base: Path, size: float = 0.05, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A random LoRA for it, saved by PEFT; `size` is the standard deviation of A and B."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn_like(parameter.data.float()) * size).to(dtype)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The state dict of PEFT's own merge, in its default mode."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    state: dict[str, torch.Tensor] = model.merge_and_unload(**options).state_dict()
    return state


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def exact(base: torch.Tensor, adapter: Path, module: str, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged weight in float64, and |W| + s |B| |A|."""
    lora = load_file(adapter / "adapter_model.safetensors")
    A, B = (lora[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    W = base.double()
    return W + scale * (B @ A), W.abs() + abs(scale) * (B.abs() @ A.abs())
