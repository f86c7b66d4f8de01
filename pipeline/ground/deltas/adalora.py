"""AdaLoRA: delta = B @ (A * E) * alpha / (r + 1e-5) (Zhang et al. 2023, arXiv:2303.10512).

r is the rank that training began with. Pruning sets singular values E to zero; a saved file holds only
the triplets left, and its config the mask that chose them (`rank_pattern`: a list of booleans, r long).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIXES = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True)
class AdaLora(Delta):
    """`A` (k, in) - (k, in * kh * kw) for kernels -, `B` (out, k), `E` (k, 1), of k <= r triplets."""

    A: Entry
    B: Entry
    E: Entry
    alpha: float
    initial_rank: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.A, self.B, self.E)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def describe(self, factor: float) -> str:
        return f"AdaLoRA rank {self.rank} of {self.initial_rank} alpha {self.alpha * factor:g}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        B = read_entry(self.B, device, dtype)
        EA = read_entry(self.A, device, dtype) * read_entry(self.E, device, dtype)
        rank = EA.new_tensor([float(self.initial_rank)]) + 1e-5  # rounded to dtype, as PEFT has it

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (B[start:stop] @ EA).mul_(self.alpha * factor).div_(rank)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    A, B, E = (trained[suffix] for suffix in _SUFFIXES)
    check_floats(trained, A, B, E)
    sizes = check_shapes(trained, {"lora_A": ("r", "in"), "lora_B": ("out", "r"), "lora_E": ("r", 1)})
    rank = trained.config["init_r"]
    left = _left(trained, rank)
    if sizes["r"] != left:
        raise trained.refuse(f"has rank {sizes['r']}, but the config leaves it {left} of {rank}")
    alpha = trained.config["lora_alpha"]
    alpha = alpha if alpha > 0 else rank  # PEFT trains so, and reloads a pruned one with its new rank
    return [AdaLora(trained.module, "weight", (sizes["out"], sizes["in"]), A, B, E, float(alpha), rank)]


def _left(trained: Trained, rank: int) -> int:
    """How many triplets the mask leaves the module; all where no mask names it."""
    masks = trained.config.get("rank_pattern") or {}
    name = f"{trained.module}.lora_E"
    mask = masks.get(name, masks.get(f"{name}.default"))
    if mask is None:
        return rank
    if len(mask) != rank:
        raise trained.refuse(f"has a mask of {len(mask)} in rank_pattern, but init_r is {rank}")
    return sum(mask)


def _wrong(config: Mapping[str, Any]) -> list[str]:
    wrong = wrong_values(config, counts=["init_r"], numbers=["lora_alpha"])
    masks = config.get("rank_pattern") or {}
    if not isinstance(masks, dict) or not all(
        isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in masks.values()
    ):
        wrong.append(f"rank_pattern is {masks!r}, not a table of names and lists of true and false")
    if config.get("alpha_pattern"):
        wrong.append("alpha_pattern is set, which AdaLoRA does not know")
    return wrong


KIND = Kind(
    peft_type="ADALORA",
    tensors=_SUFFIXES,
    # r, use_rslora and init_lora_weights are inherited from LoRA's config: PEFT does not look at them
    fields=frozenset(
        [
            "beta1",
            "beta2",
            "deltaT",
            "init_lora_weights",
            "init_r",
            "lora_alpha",
            "lora_dropout",
            "megatron_core",
            "orth_reg_weight",
            "qalora_group_size",
            "r",
            "runtime_config",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
            "use_rslora",
            "eva_config",
            "ensure_weight_tying",
        ]
    ),
    read=read,
    refused={
        "use_dora": "DoRA, which AdaLoRA does not have",
        "lora_bias": "biases in lora_B, which AdaLoRA does not have",
        "use_qalora": "QALoRA, which AdaLoRA does not have",
        "use_bdlora": "BD-LoRA, which AdaLoRA does not have",
        "target_parameters": "bare parameters, which AdaLoRA does not adapt",
        "trainable_token_indices": "trained token rows beside AdaLoRA",
        "layer_replication": "replicated layers",
        "alora_invocation_tokens": "aLoRA, which is active on some tokens only",
        "arrow_config": "Arrow routing",
        "corda_config": "CorDA, which changes the base",
        "kasa_config": "KaSA, which changes the base",
        "loftq_config": "LoftQ, which changes the base",
        "lora_ga_config": "LoRA-GA, which changes the base",
        "megatron_config": "Megatron's parallel layers",
        "monteclora_config": "MonteCLoRA",
        "velora_config": "VeLoRA",
    },
    wrong=_wrong,
)
