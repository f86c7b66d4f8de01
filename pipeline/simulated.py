"""A 16-bit weight as QLoRA training saw it: quantized to four bits when it was loaded, and decoded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from pipeline.ground import tiles
from pipeline.ground.codes.bnb4 import decode
from pipeline.ground.codes.bnb4_state import LEVELS
from pipeline.ground.codes.encoders.bnb4 import absmax_of, nested, packed, quantized, unnested
from pipeline.ground.codes.encoders.encoder import whole_rows
from pipeline.ground.codes.small_floats import pairs
from pipeline.ground.parallel import in_order
from pipeline.weight import Tile, Tiles, Weight

if TYPE_CHECKING:
    from torch import Tensor

_WORKERS = 4  # threads that look for the scales of all blocks, each at a tile


@dataclass(frozen=True)
class Simulated(Weight):
    """decode(encode(base)) by bitsandbytes' NF4 or FP4, in float32: `dequantize_4bit(quantize_4bit(base))`.

    With `double_quant` a pass over all of it finds the scales, whose own codes depend on their mean.
    """

    base: Weight
    kind: str
    blocksize: int
    double_quant: bool

    @property
    def stored_as(self) -> str:
        nested_too = ", nested scales" if self.double_quant else ""
        return f"{self.base.stored_as} through {self.kind} block {self.blocksize}{nested_too}"

    @property
    def grain(self) -> int:
        return whole_rows(self.num_columns, self.blocksize)

    @property
    def state_bytes(self) -> int:
        return self.base.state_bytes + (
            8 * -(-prod(self.shape) // self.blocksize) if self.double_quant else 0
        )

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        with self.base.open(device) as base:
            scales = self._scales(base).to(device) if self.double_quant else None
            table = pairs(LEVELS[self.kind], True, device)

            def tile(start: int, stop: int) -> Tile:
                values = base(start, stop).value.float().flatten()
                codes, absmax = quantized(values, self.kind, self.blocksize)
                if scales is not None:
                    first = start * self.num_columns // self.blocksize
                    absmax = scales[first : first + len(absmax)]
                decoded = decode(packed(codes, self.kind), absmax, self.blocksize, table)[: len(values)]
                value = decoded.view(stop - start, self.num_columns)
                return Tile(value, value)

            yield tile

    def _scales(self, base: Tiles) -> Tensor:
        """The absmax of all blocks, through their nested codes; their mean is the CPU's."""
        import torch

        def found(start: int, stop: int) -> Tensor:
            values = base(start, stop).value.float().flatten()
            return absmax_of(values, self.blocksize).cpu()

        grid = tiles.grid(self.num_rows, self.num_columns, self.grain)
        with in_order((partial(found, *rows) for rows in grid), _WORKERS, _WORKERS) as parts:
            absmax = torch.cat(list(parts))
        return unnested(*nested(absmax))
