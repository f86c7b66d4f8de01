"""bitsandbytes LLM.int8: int8 codes with a scale per row.

`weight` I8 (N, K), `SCB` F32 (N,), `weight_format` U8 (0: rows as they are; the others are tiles of old
GPU kernels). W = (codes * SCB) * f32(1 / 127), multiplied in this order: `int8_vectorwise_dequant` of
bitsandbytes. A Conv1D's weight is stored transposed, (out, in); whoever knows the model turns it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Found, Quantization, Rows
from pipeline.ground.codes.reading import each, read_small, reading, refusal, told
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_ONE_127TH = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


@dataclass(frozen=True)
class Bnb8(Code):
    """int8 codes and the largest magnitude of every row."""

    weight: Entry
    scale: Entry
    format: Entry | None

    @property
    def describe(self) -> str:
        return "bnb int8"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.weight, self.scale, *([self.format] if self.format else []))

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        columns = self.shape[1]
        with reading(device, self.weight, self.scale) as (codes, scales):

            def rows(start: int, stop: int) -> Tensor:
                raw = codes(start * columns, stop * columns).view(torch.int8)
                return decode(
                    raw.view(stop - start, columns), scales(4 * start, 4 * stop).view(torch.float32)
                )

            yield rows


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes `(rows, K)` int8 and scales `(rows,)` to `(rows, K)` float32."""
    return codes.float().mul_(scale[:, None]).mul_(_ONE_127TH)


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every module with an SCB."""

    def found(scale: Entry) -> Found:
        module = scale.name.removesuffix("SCB")
        weight, form = tensors.get(module + "weight"), tensors.get(module + "weight_format")
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
            has = told(weight) if weight else "no such tensor"
            raise refusal(scale, f"scales int8 codes, but '{module}weight' is {has}, not I8 [out, in]")
        if scale.dtype != "F32" or scale.shape != weight.shape[:1]:
            raise refusal(
                scale, f"is {told(scale)}; the codes {list(weight.shape)} need F32 [{weight.shape[0]}]"
            )
        if form and (form.extent.length != 1 or read_small(form) != b"\0"):
            raise refusal(form, "is not 0 (rows as they are): the tiles of old GPU kernels cannot be read")
        return Found(weight.name, Bnb8(weight.shape, weight, scale, form), weight)

    yield from each((e for name, e in tensors.items() if name.split(".")[-1] == "SCB"), found)
