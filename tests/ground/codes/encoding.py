"""Encoding whole weights by tiles, and comparing bytes: what the tests of encoders share."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ground.codes.encoders.encoder import Encoder
from tests.ground.codes.holding import gaussian


def weight(shape: tuple[int, int], seed: int) -> Tensor:
    """Values as models have them and as they have not: a row of zeros, one of them negative, tiny, large."""
    values = gaussian(*shape, seed=seed) * (1, 1e-36, 300)[seed % 3]
    if seed % 2:
        values[0] = 0.0
        values[0, -1] = -0.0
    return values


def encoded(
    encoder: Encoder, values: Tensor, grains: int = 1, stream: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors, what they were said to mean), from tiles of so many grains, the last one first."""
    rows = values.reshape(-1, values.shape[-1])
    step = encoder.grain * grains
    starts = list(range(0, len(rows), step))
    with encoder.open("cpu") as encode:
        made = {start: encode(rows[start : start + step], start, stream) for start in reversed(starts)}
    codes = torch.zeros(encoder.parts[0].num_bytes, dtype=torch.uint8)
    for start in starts:
        bytes_ = made[start].codes.contiguous().view(-1).view(torch.uint8)
        codes[encoder.offset(start) :][: len(bytes_)] = bytes_
    others = encoder.finish([made[start].sides if encoder.gathers else () for start in starts])
    for part in encoder.parts[1:]:
        size = others[part.name].numel() * others[part.name].element_size()
        assert size == part.num_bytes or (part.late and size <= part.num_bytes)
    decoded = torch.cat([encoder.decoded(made[start], start) for start in starts])
    return {encoder.parts[0].name: codes, **others}, decoded.view(values.shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same_bytes(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert made.keys() == wanted.keys()
    assert [name for name in made if raw(made[name]) != raw(wanted[name])] == []
