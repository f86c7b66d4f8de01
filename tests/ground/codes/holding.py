"""Checkpoints of codes: written by safetensors, found and decoded by ours, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.ground.codes.code import Code, Finder, Found, Quantization
from pipeline.ground.shards import Entry, read_shard


def held(folder: Path, *shards: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The tensors of a checkpoint of these shards, by name."""
    entries: dict[str, Entry] = {}
    for number, tensors in enumerate(shards):
        path = folder / f"shard-{number}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        entries |= {entry.name: entry for entry in read_shard(path).entries}
    return entries


def found(
    finder: Finder, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Found:
    """The one weight that a finder makes out, with all the tensors used."""
    entries = held(folder, tensors)
    (one,) = finder(entries, Quantization(config or {}))
    assert {entry.name for entry in one.code.entries} == set(entries)
    return one


def rows_of(code: Code) -> int:
    """Rows of the dense weight."""
    return prod(code.shape[:-1])


def whole(code: Code, device: str = "cpu") -> Tensor:
    """The decoded weight, of its shape."""
    with code.open(device) as rows:
        return rows(0, rows_of(code)).view(code.shape)


def in_tiles(code: Code, cuts: Iterable[int]) -> Tensor:
    """The decoded weight from the rows between these cuts, which are rounded down to the grain."""
    inner = {min(cut, rows_of(code)) // code.grain * code.grain for cut in cuts}
    bounds = sorted({0, rows_of(code)} | inner)
    with code.open("cpu") as rows:
        pieces = [rows(start, stop) for start, stop in pairwise(bounds)]
        assert rows(bounds[0], bounds[0]).shape == (0, code.shape[-1])
        assert all(piece.dtype == torch.float32 for piece in pieces)
        return torch.cat(pieces).view(code.shape)


def bits(values: Tensor) -> Tensor:
    """The bits of floats, all NaNs being one: which of them comes out is the processor's choice."""
    number = {torch.float32: (torch.int32, 0x7FC00000)}.get(values.dtype, (torch.int16, 0x7FC0))
    return torch.where(values.isnan(), number[1], values.contiguous().view(number[0]))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    """Bytes of every value."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """A weight as models have them, float32."""
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
