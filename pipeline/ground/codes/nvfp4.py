"""NVFP4: FP4 codes, an E4M3 scale for every 16 of a row, a float32 scale for the tensor.

compressed-tensors (`nvfp4-pack-quantized`): `weight_packed` U8 (N, K / 2), `weight_scale` F8_E4M3
(N, K / 16), `weight_global_scale` F32; W = level * (scale / global_scale). modelopt: `weight`,
`weight_scale` and `weight_scale_2`; W = level * (scale * scale_2). 1 / global_scale is not what scale_2 was:
the last bit differs, so each is computed as its own reader does it (`NVFP4PackedCompressor`,
`NVFP4QTensor.dequantize`).
modelopt's fused experts of Llama 4 and gpt-oss (`X`, `X_weight_scale`, `X_weight_scale_2`) lie as the model
has them, (E, in, out), and are packed along in: U8 (E, in / 2, out), scales (E, in / 16, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from pipeline.ground.codes.code import Found, Quantization
from pipeline.ground.codes.fp4 import Fp4
from pipeline.ground.codes.reading import each, refusal, told
from pipeline.ground.shards import Entry

_GROUP = 16
_WRITERS = (  # suffixes of the codes, of what they mean, of the scales; whether that of the tensor divides
    ("weight_packed", "weight", "weight_scale", "weight_global_scale", True),
    ("weight", "weight", "weight_scale", "weight_scale_2", False),
    ("", "", "_weight_scale", "_weight_scale_2", False),
)
# Beside the codes these say that they are not the weight: inputs are scaled, a low rank is added.
_UNFOLDED = ("pre_quant_scale", "svdquant_lora_a", "weight_zero_point")


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every weight of bytes that has both its scales."""

    def found(packed: Entry) -> Found | None:
        for codes, dense, scale_name, whole_name, divides in _WRITERS:
            stem = packed.name.removesuffix(codes)
            if (stem == packed.name and codes) or stem + whole_name not in tensors:
                continue
            scale, whole = tensors.get(stem + scale_name), tensors[stem + whole_name]
            if scale is None or scale.dtype != "F8_E4M3":
                has = told(scale) if scale else "no such tensor"
                what = f"'{stem}{scale_name}' is {has}, not F8_E4M3"
                raise refusal(packed, f"has '{whole.name}' beside it as NVFP4 has, but {what}")
            if unfolded := [stem + part for part in _UNFOLDED if stem + part in tensors]:
                raise refusal(packed, f"is NVFP4 that means its weight only together with '{unfolded[0]}'")
            *outer, rows, columns = packed.shape
            stacked = len(outer) > 0 and scale.shape == (*outer, rows * 2 // _GROUP, columns)
            fits = stacked or scale.shape == (*outer, rows, columns * 2 // _GROUP)
            if not fits or (rows if stacked else columns) * 2 % _GROUP:
                raise refusal(
                    scale, f"is {told(scale)}, not a scale for 16 codes each of {list(packed.shape)} bytes"
                )
            if whole.dtype != "F32" or prod(whole.shape) not in (1, prod(outer)):
                raise refusal(
                    whole, f"is {told(whole)}, not one float32 for the tensor or for each of its experts"
                )
            shape = (*outer, rows * 2, columns) if stacked else (*outer, rows, columns * 2)
            code = Fp4(shape, "NVFP4", _GROUP, packed, scale, whole, divides, stacked)
            return Found(stem + dense, code, packed)
        return None

    packed = (e for e in tensors.values() if e.dtype == "U8" and len(e.shape) > 1)
    yield from each(packed, found)
