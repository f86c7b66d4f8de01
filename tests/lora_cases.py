"""What peft_type LORA can be, each on a small model: the rows of the tests and of benchmarks/parity.py.

PEFT merges these rightly; what it merges wrongly is in tests/peft_defects.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.beside_peft import Beside, Case
from tests.models import LINEAR

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(**options: Any) -> Callable[[], PeftConfig]:
    """The config of a LoRA of rank 4 and scale 1.5, of all linear layers unless told otherwise."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    return lambda: LoraConfig(**{**defaults, **options})


def bare(*targets: str, **options: Any) -> Callable[[], PeftConfig]:
    """The same for a model that is none of transformers'."""
    return lora(target_modules=list(targets), task_type=None, **options)


def llama(**options: Any) -> Callable[[], nn.Module]:
    """A Llama of two layers, whose sizes tell inputs, outputs and heads apart."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 80,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return lambda: LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def with_biases(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The model with biases that are not zero, as they are made."""

    def made() -> nn.Module:
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        return model

    return made


def gpt2() -> nn.Module:
    """A GPT-2 of two layers; attn.c_proj is square."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=64))


def mixtral() -> nn.Module:
    """A Mixtral of two layers and four experts, which its files keep one by one."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 80,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    }
    return MixtralForCausalLM(MixtralConfig(**sizes))


def convolutions() -> nn.Module:
    """Kernels of one, two and three dimensions, one of a single point."""
    return nn.ModuleDict(
        {
            "line": nn.Conv1d(6, 10, 3),
            "plane": nn.Conv2d(6, 10, (3, 2)),
            "point": nn.Conv2d(6, 10, 1),
            "space": nn.Conv3d(6, 10, (2, 1, 3)),
        }
    )


def normed() -> nn.Module:
    """A convolution, a norm with buffers of numbers and of a count, and a head of two layers."""
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3),
            "bn": nn.BatchNorm2d(6),
            "head": nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        }
    )
    bn: Any = model["bn"]
    nn.init.normal_(bn.running_mean)
    bn.num_batches_tracked.fill_(7)
    return model


class Stacked(nn.Module):
    """Stacked matrices as bare parameters `(num, d1, d2)`."""

    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(*shape) * 0.2)
        self.is_transposed = is_transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.gate_up_proj if self.is_transposed else self.gate_up_proj.transpose(1, 2))


class Experts(nn.Module):
    """A model that is nothing but stacked matrices."""

    def __init__(self, *shape: int, is_transposed: bool = False, model_type: str | None = None) -> None:
        super().__init__()
        self.experts = Stacked(*shape, is_transposed=is_transposed)
        self.config = {"model_type": model_type} if model_type else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(x)
        return result


def stacked(*shape: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Experts(*shape, **options)


ONE = bare(target_parameters=["experts.gate_up_proj"])
CONVOLUTIONS = ("line", "plane", "point", "space")
CONV1D = ["c_attn", "c_proj", "c_fc"]
ENDS = ["embed_tokens", "lm_head"]
TIED = llama(tie_word_embeddings=True)
BIASED = with_biases(llama(attention_bias=True))
DELTA, ORDER = Beside.delta_rounded, Beside.order

LINEAR_LAYERS: dict[str, Case] = {
    "linear": Case(llama(), lora()),
    "rslora": Case(llama(), lora(use_rslora=True)),
    "patterns": Case(
        llama(),
        lora(
            rank_pattern={"layers.0.*q_proj": 8, "^model.layers.1.mlp.down_proj": 2},
            alpha_pattern={"down_proj": 3, "self_attn.*": -5},
        ),
    ),
    "some layers": Case(llama(), lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
    "by pattern": Case(llama(), lora(target_modules=r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj")),
    "all-linear but one": Case(llama(), lora(target_modules="all-linear", exclude_modules=["o_proj"])),
    "init gaussian": Case(llama(), lora(init_lora_weights="gaussian")),
    "init orthogonal": Case(llama(), lora(init_lora_weights="orthogonal")),
    "init eva": Case(llama(), lora(init_lora_weights="eva")),
    "init mica": Case(llama(), lora(init_lora_weights="mica"), DELTA),  # lora_B stays in the base's dtype
    "velora": Case(llama(), lora(velora_config=VeloraConfig())),
    "monteclora": Case(llama(), lora(monteclora_config=MontecloraConfig())),
    "bdlora": Case(
        llama(),
        lora(
            target_modules=["q_proj", "o_proj", "up_proj"],
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj", "up_proj"], nblocks=2
            ),
        ),
        DELTA,
    ),
    "dora": Case(llama(), lora(use_dora=True)),
    "dora rslora": Case(llama(), lora(use_dora=True, use_rslora=True)),
}
OTHER_LAYERS: dict[str, Case] = {
    "conv1d": Case(with_biases(gpt2), lora(target_modules=CONV1D, fan_in_fan_out=True)),
    "conv1d dora": Case(
        with_biases(gpt2), lora(target_modules=CONV1D, fan_in_fan_out=True, use_dora=True), ORDER
    ),
    "embeddings": Case(llama(), lora(target_modules=ENDS), DELTA),
    "embeddings dora": Case(llama(), lora(target_modules=ENDS, use_dora=True), ORDER),
    "convolutions": Case(convolutions, bare(*CONVOLUTIONS), ORDER),
    "convolutions dora": Case(convolutions, bare(*CONVOLUTIONS, use_dora=True), ORDER),
}
PARAMETERS: dict[str, Case] = {
    "experts": Case(mixtral, lora(target_modules=["q_proj"], target_parameters=EXPERTS), DELTA),
    "experts one parameter": Case(mixtral, lora(target_modules=[], target_parameters=EXPERTS[1:]), DELTA),
    "experts rslora": Case(
        mixtral,
        lora(
            target_modules=["q_proj"],
            target_parameters=EXPERTS,
            use_rslora=True,
            rank_pattern={"experts.gate_up_proj": 2},
        ),
        DELTA,
    ),
    "experts (out, in)": Case(stacked(3, 16, 8), ONE, DELTA),
    "experts (in, out)": Case(stacked(3, 16, 8, is_transposed=True), ONE, DELTA),
    "experts square": Case(stacked(3, 8, 8, model_type="qwen3_moe"), ONE, DELTA),
    "experts square (in, out)": Case(stacked(3, 8, 8, is_transposed=True, model_type="gpt_oss"), ONE, DELTA),
    "one expert": Case(stacked(1, 16, 8), ONE, DELTA),
    "parameter of two dimensions": Case(stacked(16, 8), ONE, DELTA),
}
BESIDE_LORA: dict[str, Case] = {
    "lora_bias": Case(BIASED, lora(target_modules=["q_proj", "o_proj"], lora_bias=True)),
    "lora_bias conv1d": Case(
        with_biases(gpt2), lora(target_modules=CONV1D, fan_in_fan_out=True, lora_bias=True)
    ),
    "lora_bias convolutions": Case(with_biases(convolutions), bare(*CONVOLUTIONS, lora_bias=True), ORDER),
    "bias all": Case(BIASED, lora(target_modules=["q_proj", "up_proj"], bias="all")),
    "bias lora_only": Case(BIASED, lora(target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "bias all conv1d": Case(with_biases(gpt2), lora(target_modules=CONV1D, fan_in_fan_out=True, bias="all")),
    "modules_to_save": Case(llama(), lora(modules_to_save=[*ENDS, "model.norm"])),
    "modules_to_save, buffers": Case(
        with_biases(normed), bare("conv", modules_to_save=["bn", "head"]), ORDER
    ),
    "modules_to_save of layers": Case(llama(), lora(target_modules=["q_proj"], modules_to_save=["mlp"])),
    "tokens": Case(llama(), lora(trainable_token_indices=[3, 77, 60])),
    "tokens of both": Case(
        llama(), lora(trainable_token_indices={"embed_tokens": [3, 77], "lm_head": [1, 2, 79]})
    ),
    "tokens alone": Case(
        llama(), lambda: TrainableTokensConfig(token_indices=[79, 0, 5], task_type="CAUSAL_LM")
    ),
}
RESIZED: dict[str, Case] = {
    "larger vocabulary": Case(llama(), lora(), vocabulary=93),
    "smaller vocabulary": Case(llama(), lora(), vocabulary=71),
    "larger, both trained": Case(llama(), lora(target_modules=[*ENDS, "q_proj"]), DELTA, vocabulary=93),
    "larger, both saved": Case(llama(), lora(modules_to_save=ENDS), vocabulary=93),
    "larger, tokens": Case(llama(), lora(trainable_token_indices=[3, 92]), vocabulary=93),
    "larger, tied": Case(TIED, lora(), vocabulary=93),
    "larger, tied, tokens": Case(TIED, lora(trainable_token_indices=[3, 92]), vocabulary=93),
    "larger, tied, tokens alone": Case(
        TIED, lambda: TrainableTokensConfig(token_indices=[92, 5], task_type="CAUSAL_LM"), vocabulary=93
    ),
    "larger, tied, both saved": Case(TIED, lora(modules_to_save=ENDS), vocabulary=93),
    "larger, tied, embeddings saved": Case(TIED, lora(modules_to_save=ENDS[:1]), vocabulary=93),
    "larger, tied, saved as one": Case(
        TIED, lora(modules_to_save=ENDS[:1], ensure_weight_tying=True), vocabulary=93
    ),
}
TIED_RIGHTLY: dict[str, Case] = {
    "tied, head saved": Case(TIED, lora(modules_to_save=ENDS[1:])),
    "tied, embeddings saved": Case(TIED, lora(modules_to_save=ENDS[:1])),
    "tied, both saved": Case(TIED, lora(modules_to_save=ENDS)),
    "tied, saved as one": Case(TIED, lora(modules_to_save=ENDS[:1], ensure_weight_tying=True)),
    "tied, tokens": Case(TIED, lora(trainable_token_indices=[3, 77])),
    "tied, tokens by name": Case(TIED, lora(trainable_token_indices={"embed_tokens": [3, 77]})),
    "tied, tokens alone": Case(
        TIED, lambda: TrainableTokensConfig(token_indices=[79, 5], task_type="CAUSAL_LM")
    ),
}
CASES: dict[str, Case] = {
    **LINEAR_LAYERS,
    **OTHER_LAYERS,
    **PARAMETERS,
    **BESIDE_LORA,
    **RESIZED,
    **TIED_RIGHTLY,
}
