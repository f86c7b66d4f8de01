"""Adapters that PEFT 0.21.2 merges wrongly, each with the right result written out by hand in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from tests.architectures import CASES
from tests.beside_peft import CONFIG, WEIGHTS, Case, State, modules_of, written_by_file_names
from tests.lora_cases import ENDS, ONE, TIED, bare, llama, lora, mixtral, stacked
from tests.models import tensors

SCALE = 1.5  # of lora()
EMBED, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Defect:
    """What PEFT does instead, and what the weights that this touches should be."""

    what: str
    case: Case
    right: Callable[[Path], State]
    """float64 weights, computed from the folder's base and adapter"""
    only_16_bits: bool = False
    """whether PEFT is right where it merges into float32"""


@dataclass(frozen=True)
class Files:
    """Tensors of base and adapter in float64."""

    folder: Path

    def __call__(self, name: str) -> torch.Tensor:
        return tensors(self.folder / "base")[name].double()

    def lora(self, module: str, adapter: str = "adapter") -> torch.Tensor:
        """B @ A of a linear layer."""
        return self.of(f"{module}.lora_B.weight", adapter) @ self.of(f"{module}.lora_A.weight", adapter)

    def embedding(self, module: str) -> torch.Tensor:
        """(B @ A).T of an embedding."""
        return (self.of(f"{module}.lora_embedding_B") @ self.of(f"{module}.lora_embedding_A")).T

    def of(self, key: str, adapter: str = "adapter") -> torch.Tensor:
        return tensors(self.folder / adapter)[f"base_model.model.{key}"].double()


def one_side(on_embeddings: bool, on_head: bool) -> Callable[[Path], State]:
    """Each side of what was shared with its own delta."""

    def right(folder: Path) -> State:
        files = Files(folder)
        W = files(f"{EMBED}.weight")
        return {
            f"{EMBED}.weight": W + SCALE * files.embedding(EMBED) if on_embeddings else W,
            f"{HEAD}.weight": W + SCALE * files.lora(HEAD) if on_head else W,
        }

    return right


def as_one(folder: Path) -> State:
    """The delta once, and one tensor for both sides."""
    files = Files(folder)
    return {f"{EMBED}.weight": files(f"{EMBED}.weight") + SCALE * files.embedding(EMBED)}


def tied_dora(folder: Path) -> State:
    """Norms over columns for the embeddings, over rows for lm_head: they cannot share a tensor."""
    files = Files(folder)
    W = files(f"{EMBED}.weight")
    V, U = W + SCALE * files.embedding(EMBED), W + SCALE * files.lora(HEAD)
    m, n = (files.of(f"{module}.lora_magnitude_vector") for module in (EMBED, HEAD))
    return {f"{EMBED}.weight": V * m / V.norm(dim=0), f"{HEAD}.weight": U * (n / U.norm(dim=1))[:, None]}


def attention(folder: Path) -> State:
    files = Files(folder)
    return {
        "attn.in_proj_weight": files("attn.in_proj_weight") + SCALE * files.lora("attn"),
        "attn.out_proj.weight": files("attn.out_proj.weight")
        + SCALE * files.lora("attn.base_layer.out_proj"),
    }


def unswapped(folder: Path) -> State:
    """D[e] = (B[:, :, e] @ A[e]).T, as PEFT before 0.19 had it whatever the parameter."""
    files = Files(folder)
    A, B = files.of("experts.lora_A.weight").view(3, 4, -1), files.of("experts.lora_B.weight").view(-1, 4, 3)
    D = torch.stack([(B[:, :, e] @ A[e]).T for e in range(3)])
    return {"experts.gate_up_proj": files("experts.gate_up_proj") + SCALE * D}


def by_file_names(pattern: str) -> Callable[[Path], State]:
    """W + s B A on every weight of the base's files whose module the pattern means."""

    def right(folder: Path) -> State:
        files = Files(folder)
        config = json.loads((folder / "adapter" / CONFIG).read_text())
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
        return {
            f"{module}.weight": files(f"{module}.weight") + scale * files.lora(module)
            for module in modules_of(folder / "base", pattern)
        }

    return right


def told(**fields: Any) -> Callable[[Path], None]:
    """Changes fields of the adapter's config."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter" / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return rewrite


def with_copies(folder: Path) -> None:
    """Makes lm_head's adapter the embeddings' one: PEFT itself keeps them so on a float32 base only."""
    path = folder / "adapter" / WEIGHTS
    held = tensors(folder / "adapter")
    for one, other in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
        held[f"base_model.model.{HEAD}.{one}"] = held[f"base_model.model.{EMBED}.{other}"].T.contiguous()
    save_file(held, path, {"format": "pt"})


def residual(folder: Path) -> State:
    """W + s (B A - B0 A0): what was taken from the base before training, and what stands in its place."""
    files = Files(folder)
    modules = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "o_proj")]
    return {
        f"{m}.weight": files(f"{m}.weight") + SCALE * (files.lora(m) - files.lora(m, "first"))
        for m in modules
    }


class Attention(nn.Module):
    """A MultiheadAttention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attn(x, x, x)[0]
        return result


def qwen2_moe() -> nn.Module:
    """A Qwen2-MoE of one layer, four experts and a shared one."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            hidden_size=32,
            intermediate_size=56,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            vocab_size=80,
        )
    )


ROUNDED = "what the init leaves of the base is rounded before the delta is added"
SHARED = "a delta meant for one side of tied embeddings goes into the tensor that both share"
QWEN_EXPERTS = r".*\.mlp\.(experts\.\d+|shared_expert)\.(gate|up|down)_proj"
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
QWEN_VL = r"(model\.layers|visual\.blocks)\.\d+\..*\.(q_proj|o_proj|up_proj|qkv)"
MIXTRAL_EXPERTS = r".*\.block_sparse_moe\.(experts\.\d+\.w[123]|gate)"


def from_base(init: str) -> Case:
    """An init that took its factors out of the base, and the untrained adapter to tell which."""
    config = lora(target_modules=["q_proj", "o_proj"], init_lora_weights=init)
    return Case(llama(), config, told_first=True)


DEFECTS: dict[str, Defect] = {
    "tied, embeddings": Defect(SHARED, Case(TIED, lora(target_modules=ENDS[:1])), one_side(True, False)),
    "tied, head": Defect(SHARED, Case(TIED, lora(target_modules=ENDS[1:])), one_side(False, True)),
    "tied, both": Defect(SHARED, Case(TIED, lora(target_modules=ENDS)), one_side(True, True)),
    "tied, as one": Defect(
        "ensure_weight_tying: the delta is added twice",
        Case(TIED, lora(target_modules=ENDS[:1], ensure_weight_tying=True), rewrite=with_copies),
        as_one,
    ),
    "tied, as one, dora": Defect(
        "ensure_weight_tying: two magnitudes are multiplied onto one tensor",
        Case(TIED, lora(target_modules=ENDS[:1], ensure_weight_tying=True, use_dora=True)),
        tied_dora,
    ),
    "out_proj of attention": Defect(
        "the delta of MultiheadAttention's out_proj is added twice",
        Case(Attention, bare("attn"), told={"out_proj_times": 1}),
        attention,
    ),
    "square experts of PEFT 0.18": Defect(
        "experts of old writers are merged transposed",
        Case(stacked(3, 8, 8, model_type="qwen3_moe"), ONE, rewrite=told(peft_version="0.18.1")),
        unswapped,
    ),
    "square experts of PEFT 0.17": Defect(
        "experts of old writers are merged transposed",
        Case(stacked(3, 8, 8, model_type="qwen3_moe"), ONE, rewrite=told(peft_version=None)),
        unswapped,
    ),
    "square experts (in, out) of PEFT 0.19.0": Defect(
        "experts of that one version are merged transposed",
        Case(stacked(3, 8, 8, model_type="qwen3_moe"), ONE, rewrite=told(peft_version="0.19.0")),
        unswapped,
    ),
    "qwen2_moe, experts by file names": Defect(
        "LoRA on routed experts is dropped without a word",
        Case(
            qwen2_moe,
            lora(target_modules=["q_proj"]),
            rewrite=written_by_file_names(QWEN_EXPERTS, target_modules=PROJECTIONS),
        ),
        by_file_names(QWEN_EXPERTS),
    ),
    "mixtral, experts by file names, rslora": Defect(
        "gate and up are sqrt(2) too large",
        Case(
            mixtral,
            lora(target_modules=["q_proj"]),
            rewrite=written_by_file_names(
                MIXTRAL_EXPERTS, target_modules=["w1", "w2", "w3", "gate"], use_rslora=True
            ),
        ),
        by_file_names(MIXTRAL_EXPERTS),
    ),
    "qwen2_5_vl, names of before transformers 5": Defect(
        "the adapter is dropped, with a warning that keys are missing",
        Case(
            CASES["Qwen2.5-VL"].make,
            lora(target_modules=["q_proj"]),
            rewrite=written_by_file_names(QWEN_VL, target_modules=["q_proj", "o_proj", "up_proj", "qkv"]),
        ),
        by_file_names(QWEN_VL),
    ),
    "pissa": Defect(f"{ROUNDED}; into float32 it is right", from_base("pissa"), residual, only_16_bits=True),
    "olora": Defect(f"{ROUNDED}; into float32 it is right", from_base("olora"), residual, only_16_bits=True),
    "pissa_niter": Defect("the init is drawn again at every load", from_base("pissa_niter_4"), residual),
}
