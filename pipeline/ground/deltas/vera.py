"""VeRA: delta = (lambda_b * B) @ (lambda_d * A), A and B random and shared (Kopiczko et al. 2023,
arXiv:2310.11454).

Each module takes the first columns of A (r, largest in) and the first rows of B (largest out, r). With
save_projection=false the file lacks them: they are drawn again from projection_prng_key and rounded to
the dtype of the base's values, in which PEFT creates them (a decoded base has float32 ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas import projection
from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Vera(Delta):
    """`lambda_b` (out,), `lambda_d` (r,); `saved`: A and B, else `key` and `largest` (out, in) tell them."""

    lambda_b: Entry
    lambda_d: Entry
    saved: tuple[Entry, Entry] | None
    key: int
    largest: tuple[int, int] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.lambda_b, self.lambda_d, *(self.saved or ()))

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[0]

    @property
    def state_bytes(self) -> int:
        drawn = sum(self.largest) * self.rank if self.largest and not self.saved else 0
        return super().state_bytes + 16 * drawn + 8 * self.rank * (self.num_rows + self.num_columns)

    def describe(self, factor: float) -> str:
        return f"VeRA rank {self.rank}" + (f" times {factor:g}" if factor != 1 else "")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return "was made for a matrix"
        if self.saved and shape[1] > self.saved[0].shape[1]:
            return f"shares a vera_A of {self.saved[0].shape[1]} columns, fewer than the weight's {shape[1]}"
        return super().misfit(shape)

    def among(self, deltas: Sequence[Delta]) -> Vera:
        return replace(self, largest=projection.largest(deltas, Vera))

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        if self.saved:
            A, B = (read_entry(entry, device, dtype) for entry in self.saved)
        else:
            assert self.largest, "a projection that is drawn needs `among` beforehand"
            created = base(0, 1).dtype
            drawn = projection.vera(self.key, self.rank, self.largest)
            A, B = (x.to(created).to(device, torch_dtype(dtype)) for x in drawn)
        A = read_entry(self.lambda_d, device, dtype)[:, None] * A[:, : self.num_columns]
        B = read_entry(self.lambda_b, device, dtype)[:, None] * B[: self.num_rows]

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            return (B[start:stop] @ A).mul_(factor)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    config = trained.config
    lambda_b, lambda_d = trained["vera_lambda_b"], trained["vera_lambda_d"]
    check_floats(trained, lambda_b, lambda_d)
    wanted = {"vera_lambda_b": ("out",), "vera_lambda_d": (config["r"],)}
    outputs = check_shapes(trained, wanted)["out"]
    saved = None
    if config.get("save_projection", True) or trained.shared:
        A, B = saved = trained.common("vera_A"), trained.common("vera_B")
        check_floats(trained, A, B)
        fits = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] == config["r"]
        if not fits or B.shape[0] < outputs:
            raise trained.refuse(
                f"has {outputs} outputs, r is {config['r']}: vera_A {list(A.shape)} and vera_B "
                f"{list(B.shape)} do not cover that"
            )
    key = config["projection_prng_key"]
    return [Vera(trained.module, "weight", (outputs, UNKNOWN), lambda_b, lambda_d, saved, key)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    return wrong_values(config, ["r"], flags=["save_projection"], seeds=["projection_prng_key"])


KIND = Kind(
    peft_type="VERA",
    tensors=("vera_lambda_b", "vera_lambda_d"),
    shared=("vera_A", "vera_B"),
    fields=frozenset(
        {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}
    ),
    read=read,
    wrong=_wrong,
)
