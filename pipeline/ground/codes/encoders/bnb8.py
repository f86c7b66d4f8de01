"""bitsandbytes LLM.int8 written: the weight in float16, then rows of int8, as `Int8Params` of 0.50.2 does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.ground.codes.bnb8 import decode
from pipeline.ground.codes.encoders.encoder import Encode, Encoded, Encoder, Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Bnb8Encoder(Encoder):
    """Rows of int8 codes and the largest magnitude of each; `with_format` as transformers writes it."""

    blur: ClassVar[float] = 2.0**-10  # a unit of float16 for the value, and one for the row's scale

    with_format: bool = True

    @property
    def describe(self) -> str:
        return "bnb int8"

    @property
    def parts(self) -> tuple[Part, ...]:
        module = self.name.removesuffix("weight")
        form = (Part(f"{module}weight_format", "U8", ()),) if self.with_format else ()
        return (Part(self.name, "I8", self.shape), Part(f"{module}SCB", "F32", self.shape[:1]), *form)

    @contextmanager
    def open(self, device: str) -> Iterator[Encode]:
        def encode(rows: Tensor, start: int, stream: int | None) -> Encoded:
            assert stream is None
            return Encoded(*quantized(rows))

        yield encode

    def decoded(self, encoded: Encoded, start: int) -> Tensor:
        return decode(encoded.codes, encoded.sides[0])

    def finish(self, sides: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        import torch

        values = (torch.cat([side[0] for side in sides]), torch.zeros((), dtype=torch.uint8))
        return {part.name: value for part, value in zip(self.parts[1:], values, strict=False)}


def quantized(rows: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """`int8_vectorwise_quant` of rows in float16: codes int8 of their shape, and a float32 for each row."""
    import torch

    half = rows.half()
    largest = half.abs().amax(1).float()
    scaled = half * (127.0 / largest)[:, None]  # float32, for the scales are
    return torch.round(scaled).nan_to_num_(nan=0.0).to(torch.int8), (largest,)
