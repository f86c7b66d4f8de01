"""BOFT: inputs turned by a product of butterfly rotations, W' = diag(s) W R^T (arXiv:2311.06243).

R = M_m ... M_1 with M_i = P_i block_diag(Cayley(R_i)) P_i^T. P_i sorts each run of 2^(i-1) blocks, in
halves of a block, evens before odds. Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly
Factorization", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.deltas.oft import times_blocks
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Boft(Delta):
    """`R` (factors, blocks, size, size), of which the skew part counts; `s` scales the outputs."""

    R: Entry
    s: Entry

    replaces: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.R, self.s)

    @property
    def state_bytes(self) -> int:
        return 5 * super().state_bytes

    def describe(self, factor: float) -> str:
        return f"BOFT {self.R.shape[0]} factors, blocks of {self.R.shape[2]}"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        R, s = read_entry(self.R, device, dtype), read_entry(self.s, device, dtype).view(-1, 1)
        Q = 0.5 * (R - R.mT)
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=device).expand_as(Q)
        rotations = torch.linalg.solve(eye + Q, eye - Q, left=False).mT.contiguous()
        orders = [butterfly(self.num_columns, Q.shape[-1], i).to(device) for i in range(len(Q))]
        levels = [(rotations[i], orders[i], orders[i].argsort()) for i in range(len(Q))]

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            W = W.to(torch_dtype(dtype))
            for rotation, order, back in levels:
                W = times_blocks(W[:, back], rotation)[:, order]
            return W * s[start:stop]

        yield rows


def butterfly(columns: int, size: int, level: int) -> Tensor:
    """Where each column comes from: runs of 2^level blocks, their half blocks at even places first."""
    import torch

    order = torch.arange(columns)
    if level == 0:
        return order
    return order.view(-1, 2**level, 2, size // 2).transpose(1, 2).reshape(-1)


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    R, s, config = trained["boft_R"], trained["boft_s"], trained.config
    check_floats(trained, R, s)
    sizes = check_shapes(trained, {"boft_R": ("factors", "blocks", "size", "size"), "boft_s": ("x", "y")})
    outputs = sizes["x"] * sizes["y"]
    if outputs not in s.shape:
        raise trained.refuse(f"has boft_s {list(s.shape)}, which is no vector over outputs")
    told = {"boft_block_size": sizes["size"], "boft_block_num": sizes["blocks"]}
    for name, size in told.items():
        if config.get(name, 0) not in (0, size):
            raise trained.refuse(
                f"has {sizes['blocks']} blocks of {sizes['size']}, but {name} {config[name]}"
            )
    factors, wanted = sizes["factors"], config["boft_n_butterfly_factor"]
    if factors not in (1, wanted):  # where its CUDA extension does not build, PEFT trains one factor
        raise trained.refuse(f"has {factors} butterfly factors, but the config says {wanted}")
    if factors > 1 and (sizes["size"] % 2 or sizes["blocks"] % 2 ** (factors - 1)):
        raise trained.refuse(
            f"has {factors} butterfly factors over {sizes['blocks']} blocks of {sizes['size']}"
        )
    return [Boft(trained.module, "weight", (outputs, sizes["blocks"] * sizes["size"]), R, s)]


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    sizes = [name for name in ("boft_block_size", "boft_block_num") if config.get(name, 0) != 0]
    return wrong_values(config, counts=[*sizes, "boft_n_butterfly_factor"])


KIND = Kind(
    peft_type="BOFT",
    tensors=("boft_R", "boft_s"),
    fields=frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights"}
    ),
    read=read,
    wrong=wrong,
)
