"""The adapter kinds beside LoRA on small models, end to end; tests/ground/deltas holds their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from peft import PeftConfig

from tests.beside_peft import Beside, Case
from tests.lora_cases import CONV1D, gpt2, llama, with_biases
from tests.models import LINEAR

BITS, DELTA, ORDER, LOOSE = Beside.bits, Beside.delta_rounded, Beside.order, Beside.loose


def kind(config: str, **options: Any) -> Callable[[], PeftConfig]:
    """A config of another kind, for all linear layers unless told otherwise."""
    told = {"target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}

    def made() -> PeftConfig:
        found: PeftConfig = getattr(peft, config)(**told)
        return found

    return made


def on_llama(config: str, beside: Beside = BITS, **options: Any) -> Case:
    return Case(llama(), kind(config, **options), beside)


def on_gpt2(config: str, beside: Beside = BITS, **options: Any) -> Case:
    """On Conv1D layers, which lie transposed."""
    return Case(with_biases(gpt2), kind(config, **{"target_modules": CONV1D, **options}), beside)


CASES: dict[str, Case] = {
    "LoHa": on_llama("LoHaConfig", r=4, alpha=6),
    "LoKr": on_llama("LoKrConfig", r=4, alpha=6),
    "LoKr, both whole": on_llama("LoKrConfig", r=99, alpha=6),
    "AdaLoRA": on_llama("AdaLoraConfig", init_r=6, target_r=4, lora_alpha=6, total_step=10),
    "IA3": on_llama(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "OFT": on_llama("OFTConfig", ORDER, r=0, oft_block_size=4),
    "BOFT": on_llama("BOFTConfig", LOOSE, boft_block_size=4, boft_n_butterfly_factor=1),
    "HRA": on_llama("HRAConfig", LOOSE, r=4),
    "VeRA": on_llama("VeraConfig", r=8, target_modules=["q_proj", "o_proj"]),
    "VeRA, projection drawn again": on_llama(
        "VeraConfig", r=8, target_modules=["q_proj", "v_proj", "down_proj"], save_projection=False
    ),
    "RandLoRA": on_llama("RandLoraConfig", DELTA, r=4, target_modules=["q_proj", "v_proj"]),
    "FourierFT": on_llama("FourierFTConfig", LOOSE, n_frequency=50),
    "C3A": on_llama("C3AConfig", LOOSE, block_size=8),
    "VBLoRA": on_llama("VBLoRAConfig", r=4, num_vectors=16, vector_length=8, topk=2),
    "VBLoRA, top k": on_llama(
        "VBLoRAConfig", r=4, num_vectors=16, vector_length=8, topk=2, save_only_topk_weights=True
    ),
    "SHiRA": on_llama("ShiraConfig", r=4),
    "MiSS": on_llama("MissConfig", r=4),
    "MiSS, bat": on_llama("MissConfig", r=4, init_weights="bat", target_modules=["q_proj", "o_proj"]),
    "MiSS, mini": on_llama("MissConfig", r=4, mini_r=2, init_weights="mini"),
    "DeLoRA": on_llama("DeloraConfig", DELTA, r=4, delora_lambda=15),
    "GraLoRA": on_llama("GraloraConfig", r=4, alpha=6, gralora_k=2),
    "HiRA": on_llama("HiraConfig", DELTA, r=4),
    "LN tuning": on_llama("LNTuningConfig", target_modules=["input_layernorm", "model.norm"]),
    "IA3 on Conv1D": on_gpt2("IA3Config", feedforward_modules=["c_fc"]),
    "AdaLoRA on Conv1D": on_gpt2(
        "AdaLoraConfig", init_r=6, target_r=4, lora_alpha=6, total_step=10, fan_in_fan_out=True
    ),
    "VeRA on Conv1D": on_gpt2("VeraConfig", r=8, target_modules=["c_fc"], fan_in_fan_out=True),
    "FourierFT on Conv1D": on_gpt2("FourierFTConfig", LOOSE, n_frequency=50, fan_in_fan_out=True),
    "VBLoRA on Conv1D": on_gpt2(
        "VBLoRAConfig", r=4, num_vectors=16, vector_length=8, topk=2, fan_in_fan_out=True
    ),
}
