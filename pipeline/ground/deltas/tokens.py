"""Trainable tokens: some rows of an embedding are the file's. Its `_delta` is a misnomer for new rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenRows(Delta):
    """`entry` (tokens, emb_dim) holds the rows at `indices`, in that order; Refused for odd indices."""

    entry: Entry
    indices: tuple[int, ...]

    replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        odd = [i for i in self.indices if not isinstance(i, int) or isinstance(i, bool) or i < 0]
        if odd:
            raise Refused(f"'{self.module}' has the token index {odd[0]!r}, which is none")
        if len(set(self.indices)) < len(self.indices):
            raise Refused(f"'{self.module}' has a token index twice")
        if len(self.indices) != self.entry.shape[0]:
            raise Refused(
                f"'{self.module}' has {self.entry.shape[0]} token rows for {len(self.indices)} token indices"
            )

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    def describe(self, factor: float) -> str:
        return f"{len(self.indices)} token rows"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        told, last = super().misfit(shape), max(self.indices, default=-1)
        if told is None and last >= shape[0]:
            return f"has a row for token {last}, beyond a vocabulary of {shape[0]}"
        return told

    def turned(self) -> TokenRows:
        return self  # no embedding lies transposed

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        indices = torch.tensor(self.indices, dtype=torch.int64, device=device)
        trained = read_entry(self.entry, device, dtype)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            here = (indices >= start) & (indices < stop)
            value = W.to(torch_dtype(dtype), copy=True)
            return value.index_copy_(0, indices[here] - start, trained[here])

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one embedding."""
    entry = trained["trainable_tokens_delta"]
    check_floats(trained, entry)
    sizes = check_shapes(trained, {"trainable_tokens_delta": ("tokens", "dim")})
    indices = trained.config.get("token_indices")
    if not isinstance(indices, list):
        raise Refused(f"token_indices is {indices!r}, not a list of token indices")
    return [TokenRows(trained.module, "weight", (UNKNOWN, sizes["dim"]), entry, tuple(indices))]


KIND = Kind(
    peft_type="TRAINABLE_TOKENS",
    tensors=("trainable_tokens_delta",),
    fields=frozenset({"token_indices", "init_weights"}),
    read=read,
)
