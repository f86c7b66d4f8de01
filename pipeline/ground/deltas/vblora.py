"""VB-LoRA: delta = B @ A, both put together from a bank of vectors that all modules share
(Li et al. 2024, arXiv:2405.15179).

Every piece of A and B is a mix of the top k vectors, weighted by the softmax of their logits. With
save_only_topk_weights the file holds the k indices and the first k - 1 weights instead of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats
from pipeline.ground.errors import PipelineError
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDEX_DTYPES = frozenset({"U8", "I16", "I32", "I64"})


@dataclass(frozen=True)
class VbLora(Delta):
    """`A` is (logits (r, in / length, vectors),) or (indices (r, in / length, k), weights (.., k - 1)).

    `B` likewise over (out / length, r).
    """

    A: tuple[Entry, ...]
    B: tuple[Entry, ...]
    bank: Entry
    topk: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (*self.A, *self.B, self.bank)

    @property
    def rank(self) -> int:
        return self.A[0].shape[0]

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + (self.topk + 1) * 8 * self.rank * (self.num_rows + self.num_columns)

    def describe(self, factor: float) -> str:
        return f"VB-LoRA rank {self.rank} top {self.topk} of {self.bank.shape[0]}" + (
            f" times {factor:g}" if factor != 1 else ""
        )

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        # on the CPU, whose choice among equal logits is always the same
        A = self._mixed(self.A, dtype).flatten(1).to(device)
        B = self._mixed(self.B, dtype).transpose(1, 2).reshape(-1, self.rank).to(device)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (B[start:stop] @ A).mul_(factor)

        yield rows

    def _mixed(self, entries: tuple[Entry, ...], dtype: str) -> Tensor:
        """(.., .., length): the pieces."""
        import torch

        bank = read_entry(self.bank, "cpu", dtype)
        if len(entries) == 1:
            logits, indices = read_entry(entries[0], "cpu", dtype).topk(self.topk, dim=-1)
        else:
            indices, weights = read_entry(entries[0]).long(), read_entry(entries[1], "cpu", dtype)
            if indices.numel() and not (indices.min() >= 0 and indices.max() < len(bank)):
                raise PipelineError(f"'{entries[0].name}' names a vector outside the bank of {len(bank)}")
            last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
            logits, order = torch.cat([weights, last], dim=-1).log().topk(self.topk, dim=-1)
            indices = indices.gather(-1, order)
        return (logits.softmax(dim=-1).unsqueeze(-1) * bank[indices]).sum(-2)


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    config = trained.config
    bank, topk = trained.common("vblora_vector_bank"), config["topk"]
    check_floats(trained, bank)
    if bank.shape != (config["num_vectors"], config["vector_length"]):
        raise trained.refuse(
            f"shares a vblora_vector_bank {list(bank.shape)}, but the config says {config['num_vectors']} "
            f"vectors of length {config['vector_length']}"
        )
    A, B = (_pieces(trained, name, topk, bank.shape[0]) for name in _LOGITS)
    if not A[0].shape[0] == B[0].shape[1] == config["r"]:
        raise trained.refuse(
            f"has ranks {A[0].shape[0]} and {B[0].shape[1]}, but the config says {config['r']}"
        )
    shape = (B[0].shape[0] * bank.shape[1], A[0].shape[1] * bank.shape[1])
    return [VbLora(trained.module, "weight", shape, A, B, bank, topk)]


def _pieces(trained: Trained, name: str, topk: int, num_vectors: int) -> tuple[Entry, ...]:
    """The logits of one factor, or its indices and weights, three-dimensional each."""
    indices, weights = f"{name}_topk_indices", f"{name}_topk_weights"
    found: tuple[Entry, ...]
    last: tuple[int, ...]
    if trained.config.get("save_only_topk_weights"):
        if trained.get(name):
            raise trained.refuse(f"has {name}, but save_only_topk_weights is set")
        found = (trained[indices], trained[weights])
        last = (topk, topk - 1)
        if found[0].dtype not in _INDEX_DTYPES:
            raise trained.refuse(f"has {indices} of {found[0].dtype}, not whole numbers")
    else:
        if trained.get(indices) or trained.get(weights):
            raise trained.refuse(f"has top-k tensors of {name}, but save_only_topk_weights is not set")
        found, last = (trained[name],), (num_vectors,)
    check_floats(trained, found[-1])
    for entry, size in zip(found, last, strict=True):
        if len(entry.shape) != 3 or entry.shape[2] != size or entry.shape[:2] != found[0].shape[:2]:
            raise trained.refuse(
                f"has {entry.name.rpartition('.')[2]} {list(entry.shape)}, not .. x .. x {size}"
            )
    return found


def _wrong(config: Mapping[str, Any]) -> list[str]:
    counts = ["r", "num_vectors", "vector_length", "topk"]
    wrong = wrong_values(config, counts=counts, flags=["save_only_topk_weights"])
    if not wrong and config["topk"] > config["num_vectors"]:
        wrong.append(f"topk is {config['topk']}, more than the {config['num_vectors']} vectors there are")
    return wrong


KIND = Kind(
    peft_type="VBLORA",
    tensors=tuple(f"{name}{tail}" for name in _LOGITS for tail in ("", "_topk_indices", "_topk_weights")),
    shared=("vblora_vector_bank",),
    fields=frozenset(
        [
            "r",
            "num_vectors",
            "vector_length",
            "topk",
            "save_only_topk_weights",
            "vblora_dropout",
            "init_vector_bank_bound",
            "init_logits_std",
        ]
    ),
    read=read,
    wrong=_wrong,
)
