"""HRA: inputs reflected at r learned planes, W' = W H_1 ... H_r, H = I - 2 u u^T (arXiv:2405.17484).

The product is kept as I - U T U^T, with T^-1 the upper triangle of U^T U and halves on its diagonal
(Joffrain et al. 2006, "Accumulating Householder transformations, revisited"), so that the rows cost
O(columns * r). With apply_GS the planes are made orthogonal first. Yuan et al., "Bridging The Gap between
Low-rank and Orthogonal Adaptation via Householder Reflection", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hra(Delta):
    """`u` (in, rank) holds the planes' normals of any length."""

    u: Entry
    orthogonal: bool

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.u,)

    @property
    def state_bytes(self) -> int:
        return 4 * super().state_bytes

    def describe(self, factor: float) -> str:
        return f"HRA {self.u.shape[1]} reflections"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        factors = reflections(read_entry(self.u, "cpu", "F64"), self.orthogonal)  # not all devices have F64
        left, right = (factor.to(device, torch_dtype(dtype)) for factor in factors)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            W = W.to(torch_dtype(dtype))
            return W - (W @ left) @ right

        yield rows


def reflections(u: Tensor, orthogonal: bool) -> tuple[Tensor, Tensor]:
    """(U, T U^T) with I - U T U^T the product of the reflections at the columns of u, from left to right."""
    import torch

    if orthogonal:
        for i in range(u.shape[1]):
            u[:, i] /= u[:, i].norm()
            u[:, i + 1 :] -= torch.outer(u[:, i], u[:, i] @ u[:, i + 1 :])
        return u, 2 * u.T
    U = u / u.norm(dim=0)
    inverse = torch.triu(U.T @ U, 1) + torch.eye(U.shape[1], dtype=U.dtype, device=U.device) / 2
    return U, torch.linalg.solve_triangular(inverse, U.T, upper=True)


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    u = trained["hra_u"]
    check_floats(trained, u)
    sizes = check_shapes(trained, {"hra_u": ("in", "r")})
    if sizes["r"] != trained.config["r"]:
        raise trained.refuse(f"has {sizes['r']} reflections, but the config's r is {trained.config['r']}")
    orthogonal = bool(trained.config.get("apply_GS"))
    return [Hra(trained.module, "weight", (UNKNOWN, sizes["in"]), u, orthogonal)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    return wrong_values(config, counts=["r"], flags=["apply_GS"])


KIND = Kind(
    peft_type="HRA",
    tensors=("hra_u",),
    fields=frozenset({"r", "apply_GS", "init_weights"}),
    read=read,
    wrong=wrong,
)
