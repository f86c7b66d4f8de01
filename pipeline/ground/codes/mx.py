"""MXFP4: FP4 codes with a power of two (E8M0) for every 32 of a row.

compressed-tensors (`mxfp4-pack-quantized`) `weight_packed` U8 (N, K / 2), `weight_scale` U8 (N, K / 32);
Quark and modelopt `weight` and `weight_scale` alike; DeepSeek-V4's experts `weight` I8 or F4 and `scale`
F8_E8M0.

gpt-oss: `X_blocks` U8 (E, O, I / 32, 16) and `X_scales` U8 (E, O, I / 32) mean `X` (E, I, O), transposed:
transformers' `convert_moe_packed_tensors`, by ldexp, which overflows later than a product with the power.
A row of it takes a nibble of every row of bytes, so the bytes of an expert are held while its rows are asked
for. (MXFP8 is a layout of fp8.py.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from pipeline.ground.codes.code import Code, Found, Quantization, Rows
from pipeline.ground.codes.fp4 import Fp4
from pipeline.ground.codes.fp8 import scale_names
from pipeline.ground.codes.reading import each, reading, refusal, told
from pipeline.ground.codes.small_floats import E2M1, E8M0, byte_values, looked_up, stacked
from pipeline.ground.shards import Entry
from pipeline.ground.streams import kept, used

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 32
_DOUBLED = tuple(2 * level for level in E2M1)
_HELD = 2  # experts whose bytes are held: tiles in flight are of one, or of two that follow each other


@dataclass(frozen=True)
class GptOss(Code):
    """The experts of gpt-oss, (E, I, O), from bytes that lie by O."""

    blocks: Entry
    scales: Entry

    @property
    def describe(self) -> str:
        return "MXFP4 transposed"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.blocks, self.scales)

    @property
    def grain(self) -> int:
        return _GROUP

    @property
    def state_bytes(self) -> int:
        experts, inputs, outputs = self.shape
        return min(experts, _HELD) * outputs * (inputs // 2 + inputs // _GROUP)

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        _, inputs, outputs = self.shape
        powers, one_at_a_time = _half_powers(device), Lock()
        with reading(device, self.blocks, self.scales) as parts:

            @lru_cache(_HELD)
            def expert(index: int) -> list[Tensor]:
                sizes = (outputs * inputs // 2, outputs * inputs // _GROUP)
                both = zip(parts, sizes, strict=True)
                return [kept(read(index * n, (index + 1) * n)).view(outputs, -1) for read, n in both]

            def rows(start: int, stop: int) -> Tensor:
                pieces = [powers.new_empty(0, outputs)]
                for index in range(start // inputs, -(-stop // inputs)):
                    with one_at_a_time:
                        packed, scales = map(used, expert(index))
                    low, high = max(start - index * inputs, 0), min(stop - index * inputs, inputs)
                    pieces.append(decode(packed, scales, low, high, powers))
                return pieces[1] if len(pieces) == 2 else torch.cat(pieces)

            yield rows


def decode(packed: Tensor, scales: Tensor, low: int, high: int, powers: Tensor) -> Tensor:
    """Rows low:high, `(high - low, O)` float32, of `(O, I / 2)` and `(O, I / 32)`; 32 divides low."""
    first, last = low // _GROUP, -(-high // _GROUP)
    codes = packed[:, first * _GROUP // 2 : last * _GROUP // 2].t().contiguous()
    scale = looked_up(powers, scales[:, first:last].t().contiguous())
    return stacked(codes, scale, _GROUP, _DOUBLED)[: high - low]


def _half_powers(device: str) -> Tensor:
    """2^(byte - 128) of every byte, `(256,)` float32, for doubled levels: it overflows where ldexp does."""
    powers = byte_values("U8", "cpu") / 2
    powers[255] = 2.0**127
    return powers.to(device)


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every tensor of four-bit codes with a scale of E8M0, and gpt-oss's experts."""
    other_scales = "e5m3" in str(quantization.config)  # of Quark, bytes too

    def found(packed: Entry) -> Found | None:
        if packed.name.endswith("_blocks"):
            return _gpt_oss(packed, tensors)
        if packed.dtype not in ("U8", "I8", "F4") or len(packed.shape) < 2:
            return None
        name = packed.name.removesuffix("_packed")
        scale = next((tensors[n] for n in scale_names(name) if n in tensors), None)
        if scale is None or scale.dtype not in E8M0 or (scale.dtype == "U8" and other_scales):
            return None
        *outer, columns = packed.shape
        columns *= 1 if packed.dtype == "F4" else 2
        if scale.shape != (*outer, columns // _GROUP) or columns % _GROUP:
            raise refusal(
                scale, f"is {told(scale)}, not a scale for 32 codes each of '{packed.name}' {told(packed)}"
            )
        return Found(name, Fp4((*outer, columns), "MXFP4", _GROUP, packed, scale), packed)

    yield from each(tensors.values(), found)


def _gpt_oss(blocks: Entry, tensors: Mapping[str, Entry]) -> Found | None:
    name = blocks.name.removesuffix("_blocks")
    scales = tensors.get(name + "_scales")
    if (
        blocks.dtype in ("BF16", "F16", "F32")
        and scales is None
        and name.endswith(("gate_up_proj", "down_proj"))
    ):
        raise refusal(
            blocks,
            f"is {blocks.dtype} under the name of codes: transformers wrote it after it had loaded MXFP4; "
            "save it again with save_original_format=False",
        )
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _GROUP:
        return None
    if scales is None or (scales.dtype, scales.shape) != ("U8", blocks.shape[:-1]):
        has = f"'{scales.name}' is {told(scales)}" if scales else f"there is no '{name}_scales'"
        raise refusal(blocks, f"holds MXFP4 codes, but {has}, not U8 {list(blocks.shape[:-1])}")
    experts, outputs, groups, _ = blocks.shape
    return Found(name, GptOss((experts, groups * _GROUP, outputs), blocks, scales), blocks)
