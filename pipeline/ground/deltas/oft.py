"""OFT: inputs turned by a block-diagonal rotation, W' = W R^T (Qiu et al. 2023, arXiv:2306.07280).

Each block comes from a skew-symmetric Q. By default PEFT trains the first terms of the Cayley-Neumann
series, R = I + 2Q + 2Q^2 + ... = (I + Q) (I - Q)^-1 (Qiu et al. 2025, arXiv:2506.19847); its exact transform
has the other sign, R = (I - Q) (I + Q)^-1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes, is_count
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Oft(Delta):
    """`entry` (blocks, size * (size - 1) / 2) holds upper triangles of Q; a single one may be shared."""

    entry: Entry
    size: int
    terms: int | None  # of the Neumann series; None for the exact transform
    halved: bool  # whether its last term comes once, as since PEFT 0.18, and not twice
    eps: float | None  # COFT: Q lies within this distance of zero
    embedding: bool

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    @property
    def state_bytes(self) -> int:
        return 8 * 6 * self.entry.shape[0] * self.size**2

    def describe(self, factor: float) -> str:
        return f"OFT blocks of {self.size}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if prod(shape[2:]) > 1:
            return (
                "would need kernels of one pixel (PEFT trains OFT on larger ones with overlapping patches "
                "that it sums up, which no kernel computes and its own merge does not give)"
            )
        told = super().misfit(shape)
        if told is None and shape[1] % self.size:
            return f"was made for inputs in blocks of {self.size}"
        return told

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        R = self._rotations(read_entry(self.entry, device, dtype))
        R = (R if self.embedding else R.mT).contiguous()

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return times_blocks(W.to(torch_dtype(dtype)), R)

        yield rows

    def _rotations(self, triangles: Tensor) -> Tensor:
        import torch

        upper = torch.triu_indices(self.size, self.size, 1, device=triangles.device)
        Q = triangles.new_zeros(len(triangles), self.size, self.size)
        Q[:, upper[0], upper[1]] = triangles
        Q = Q - Q.mT
        if self.eps is not None:
            limit = self.eps / torch.tensor(len(Q), dtype=Q.dtype, device=Q.device).sqrt()
            norm = torch.linalg.matrix_norm(Q, keepdim=True)
            Q = torch.where(norm <= limit, Q, limit * (Q / norm))
        eye = torch.eye(self.size, dtype=Q.dtype, device=Q.device).expand_as(Q)
        if self.terms is None:
            return torch.linalg.solve(eye + Q, eye - Q, left=False)
        R, power = eye.clone(), Q
        for factor in neumann_factors(self.terms, self.halved):
            R, power = R.add(power, alpha=factor), power @ Q
        return R


def neumann_factors(terms: int, halved: bool) -> list[float]:
    """What Q, Q^2, ... are multiplied by; since 0.18 PEFT adds a last term once, and to three a fourth."""
    if not halved or terms < 3:
        return [2.0] * (terms - 1)
    return [2.0] * max(terms - 2, 2) + [1.0]


def times_blocks(W: Tensor, blocks: Tensor) -> Tensor:
    """W (n, columns) @ block_diag(blocks), blocks (columns / size, size, size), or one for all places."""
    X = W.reshape(len(W), -1, blocks.shape[-1])
    if len(blocks) == 1:
        return (X @ blocks[0]).view(W.shape)
    return (X.transpose(0, 1) @ blocks).transpose(0, 1).reshape(W.shape)


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    config, embedding = trained.config, "oft_embedding_R.weight" in trained.tensors
    suffix = "oft_embedding_R.weight" if embedding else "oft_R.weight"
    entry = trained[suffix]
    check_floats(trained, *trained.tensors.values())
    if len(trained.tensors) > 1:
        raise trained.refuse("has rotations of a layer and of an embedding")
    num, triangle = check_shapes(trained, {suffix: ("blocks", "n")}).values()
    size = (1 + isqrt(1 + 8 * triangle)) // 2
    if not num or size * (size - 1) // 2 != triangle:
        raise trained.refuse(f"has {suffix} {list(entry.shape)}, whose rows are no triangles")
    shared = bool(config.get("block_share"))
    if shared and num != 1:
        raise trained.refuse(f"has {num} blocks, but the config's block_share allows one")
    inputs = UNKNOWN if shared else num * size
    if not shared and (told := _told_size(inputs, config)) != size:
        raise trained.refuse(f"has blocks of {size}, but the config's mean {told}")
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
    halved = (_version(config) or (0, 0)) >= (0, 18)
    eps = config["eps"] if config.get("coft") else None
    shape = (UNKNOWN, inputs)
    return [Oft(trained.module, "weight", shape, entry, size, terms, halved, eps, embedding)]


def _told_size(inputs: int, config: Mapping[str, Any]) -> int:
    """The block size that PEFT makes of r or oft_block_size: the nearest that divides, the lower of two."""
    wanted: int = min(config["oft_block_size"] or config["r"], inputs)
    near = (n for far in range(inputs) for n in (wanted - far, wanted + far))
    nearest = next(n for n in near if 0 < n <= inputs and inputs % n == 0)
    return nearest if config["oft_block_size"] else inputs // nearest


def _version(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (major, minor) of the PEFT that wrote it; None before 0.18, which was the first to say."""
    found = re.match(r"(\d+)\.(\d+)\.", str(config.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else None


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be, or is not told."""
    found = []
    if "oft_block_size" not in config:
        found.append(
            "oft_block_size is missing, so PEFT before 0.14 wrote this; its OFT meant something else"
        )
    elif not is_count(config["oft_block_size"] or config.get("r")):
        found.append(f"oft_block_size is {config['oft_block_size']!r} and r {config.get('r')!r}")
    if not isinstance(config.get("use_cayley_neumann"), bool):
        found.append(f"use_cayley_neumann is {config.get('use_cayley_neumann')!r}, neither true nor false")
    elif config["use_cayley_neumann"]:
        if not is_count(terms := config.get("num_cayley_neumann_terms")):
            found.append(f"num_cayley_neumann_terms is {terms!r}, not a number of terms")
        if "0.18.0.dev" in str(version := config.get("peft_version")):
            found.append(f"peft_version is {version!r}, between two meanings of the Cayley-Neumann series")
    numbers = ["eps"] if config.get("coft") else []
    return found + wrong_values(config, numbers=numbers, flags=["coft", "block_share"])


KIND = Kind(
    peft_type="OFT",
    tensors=("oft_R.weight", "oft_embedding_R.weight"),
    fields=frozenset(
        {
            *("r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        }
    ),
    read=read,
    wrong=wrong,
)
