"""IA3: activations times a learned vector l, W' = W * l (Liu et al. 2022, arXiv:2205.05638).

l scales the outputs, and with them the bias; in a feedforward module it scales the inputs instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.kind import Kind, Trained, check_floats
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ia3(Delta):
    """The parameter times l along its dimension `axis`; grouped kernels hold their inputs by groups."""

    entry: Entry
    axis: int

    replaces: ClassVar[bool] = True

    @property
    def optional(self) -> bool:
        return self.parameter == "bias"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    @property
    def state_bytes(self) -> int:
        return 8 * prod(self.entry.shape) * prod(self.shape[2:])

    def describe(self, factor: float) -> str:
        return f"IA3 on {'outputs' if self.axis == 0 else 'inputs'}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        size, told = prod(self.entry.shape), f"was made for a weight {list(self.shape)}"
        if len(shape) != len(self.shape):
            return told
        if self.axis == 0 or len(shape) == 2:
            return None if shape[self.axis] == size else told
        groups = size // max(shape[1], 1)
        return None if groups and groups * shape[1] == size and shape[0] % groups == 0 else told

    def turned(self) -> Delta:
        if self.parameter == "bias":
            return self
        return replace(self, axis=1 - self.axis, shape=self.shape[::-1])

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        scales = read_entry(self.entry, device, dtype).flatten()  # to (groups, columns), groups of rows
        if len(self.shape) == 1:
            scales = scales[None]
        elif self.axis == 0:
            scales = scales[:, None]
        else:
            scales = scales.view(-1, self.shape[1]).repeat_interleave(prod(self.shape[2:]), 1)
        height = self.num_rows // len(scales)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            here = scales if len(scales) == 1 else scales[torch.arange(start, stop, device=device) // height]
            return W.to(torch_dtype(dtype)) * here

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of the weight and, where the outputs are scaled, of the bias."""
    entry = trained["ia3_l"]
    check_floats(trained, entry)
    dims, size = len(entry.shape), prod(entry.shape)
    if dims not in (2, 4, 5) or size not in entry.shape[:2] or (dims > 2 and size != entry.shape[1]):
        raise trained.refuse(f"has ia3_l {list(entry.shape)}, which is no vector over outputs or inputs")
    inputs = _is_feedforward(trained)
    if dims == 2 and size > 1 and inputs != (entry.shape[1] == size):
        raise trained.refuse(
            f"has ia3_l {list(entry.shape)}, but feedforward_modules {'lists' if inputs else 'lacks'} it"
        )
    shape = [UNKNOWN] * dims
    shape[int(inputs)] = size
    weight = Ia3(trained.module, "weight", tuple(shape), entry, axis=int(inputs))
    return [weight] if inputs else [weight, Ia3(trained.module, "bias", (size,), entry, axis=0)]


def _is_feedforward(trained: Trained) -> bool:
    named = trained.config["feedforward_modules"]
    if not isinstance(named, str):
        return any(trained.module.endswith(name) for name in named)  # PEFT asks for no dot before it
    try:
        return re.fullmatch(named, trained.module) is not None
    except re.error as error:
        raise Refused(f"feedforward_modules {named!r} is not a regular expression ({error})") from None


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be."""
    named = config.get("feedforward_modules")
    if isinstance(named, str) or (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        return []
    return [f"feedforward_modules is {named!r}, neither a list of names nor a pattern"]


KIND = Kind(
    peft_type="IA3",
    tensors=("ia3_l",),
    fields=frozenset({"feedforward_modules", "init_ia3_weights"}),
    read=read,
    wrong=wrong,
)
