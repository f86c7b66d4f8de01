"""MXFP4 against transformers, compressed-tensors and the formula in numpy, bit for bit. (MXFP8: test_fp8.)"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import mx
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits, found, held, in_tiles, random_bytes, rows_of, whole

LEVELS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCKS, SCALES = "mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales"


def gpt_oss(experts: int, outputs: int, inputs: int, low: int = 0, high: int = 256) -> dict[str, Tensor]:
    """Random codes, scales from `low` on."""
    generator = torch.Generator().manual_seed(1)
    shape = experts, outputs, inputs // 32
    scale = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
    return {BLOCKS: random_bytes(*shape, 16), SCALES: scale}


def formula(packed: Tensor, scales: Tensor) -> Tensor:
    """Bytes (..., N, K / 2) and powers (..., N, K / 32) by the definition, in numpy; low nibble first."""
    raw = packed.view(torch.uint8).numpy()
    values = LEVELS[np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)]
    exponent = np.repeat(scales.view(torch.uint8).numpy().astype(np.int32) - 127, 32, -1)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ldexp(values, exponent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 40, 96), (1, 1, 32), (2, 7, 64), (4, 33, 160)])
def test_gpt_oss_experts_decode_as_transformers_decodes_them(
    tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = gpt_oss(*shape)
    expected = convert_moe_packed_tensors(tensors[BLOCKS], tensors[SCALES], dtype=dtype)
    one = found(mx.find, tmp_path, tensors, {"quant_method": "mxfp4"})
    experts, outputs, inputs = shape
    assert (one.name, one.code.shape) == ("mlp.experts.gate_up_proj", (experts, inputs, outputs))
    for values in (whole(one.code), in_tiles(one.code, [32, 70, 100, 130, 200, 300])):
        assert torch.equal(values.to(dtype), expected)
        assert torch.equal(values.to(dtype).signbit(), expected.signbit())


def test_every_scale_of_gpt_oss_is_a_power_of_two_and_the_largest_overflows_late(tmp_path: Path) -> None:
    tensors = gpt_oss(1, 256, 32)
    tensors[SCALES] = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    values = whole(found(mx.find, tmp_path, tensors).code)
    exact = formula(tensors[BLOCKS].flatten(2), tensors[SCALES]).transpose(1, 2)
    assert torch.equal(bits(values), bits(exact))
    assert values[0, :, 255].isfinite().any()  # 0.5 * 2^128: as a product with infinity it would be lost


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 3),
    outputs=st.integers(1, 20),
    groups=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_gpt_oss_experts_in_any_tiles_are_the_whole(
    experts: int, outputs: int, groups: int, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = gpt_oss(experts, outputs, groups * 32)
    code = found(mx.find, tmp_path_factory.mktemp("held"), tensors).code
    expected = formula(tensors[BLOCKS].flatten(2), tensors[SCALES]).transpose(1, 2)
    assert torch.equal(bits(whole(code)), bits(expected))
    assert torch.equal(bits(in_tiles(code, cuts)), bits(expected))


def test_gpt_oss_tiles_from_several_threads_hold_the_bytes_of_two_experts(tmp_path: Path) -> None:
    code = found(mx.find, tmp_path, gpt_oss(6, 24, 128)).code
    assert code.state_bytes == 2 * 24 * (128 // 2 + 128 // 32)
    expected = whole(code)
    with code.open("cpu") as rows, ThreadPoolExecutor(4) as pool:
        starts = range(0, rows_of(code), 32)
        tiles = list(pool.map(lambda start: rows(start, start + 32), starts))
    assert torch.equal(torch.cat(tiles).view(code.shape), expected)


@pytest.mark.parametrize("shape", [(64, 64), (5, 96), (1, 32)])
def test_linear_weights_decode_as_compressed_tensors_decodes_them(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packed, scale = random_bytes(shape[0], shape[1] // 2), random_bytes(shape[0], shape[1] // 32, seed=1)
    scale[0, 0] = 255
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    decoder = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    expected = decoder.decompress({"weight_packed": packed, "weight_scale": scale}, scheme)["weight"]
    one = found(mx.find, tmp_path, {"a.weight_packed": packed, "a.weight_scale": scale})
    assert (one.name, one.code.shape, one.code.describe) == ("a.weight", shape, "MXFP4")
    for values in (whole(one.code), in_tiles(one.code, [1, 2, 3, 40])):
        assert torch.equal(bits(values.to(expected.dtype)), bits(expected))


@pytest.mark.parametrize(
    ("dtype", "names", "config"),
    [
        (torch.uint8, ("a.weight", "a.weight_scale"), {"quant_method": "quark", "scale_format": "e8m0"}),
        (torch.uint8, ("a.weight_packed", "a.weight_scale"), {"quant_method": "compressed-tensors"}),
        (torch.uint8, ("experts.x", "experts.x_weight_scale"), {"quant_method": "modelopt"}),
        (torch.int8, ("a.weight", "a.scale"), {"quant_method": "fp8", "expert_dtype": "fp4"}),
        (torch.float4_e2m1fn_x2, ("a.weight", "a.scale"), {"quant_method": "fp8", "expert_dtype": "fp4"}),
    ],
)
def test_every_writer_has_the_same_codes(
    tmp_path: Path, dtype: torch.dtype, names: tuple[str, str], config: dict[str, Any]
) -> None:
    packed, scale = random_bytes(6, 32), random_bytes(6, 2, seed=1).clamp_max(254)
    stored = scale if dtype == torch.uint8 else scale.view(torch.float8_e8m0fnu)
    one = found(mx.find, tmp_path, dict(zip(names, (packed.view(dtype), stored), strict=True)), config)
    assert one.code.shape == (6, 64)
    assert one.name == names[0].removesuffix("_packed")
    assert torch.equal(bits(whole(one.code)), bits(formula(packed, scale)))


def test_deepseek_experts_decode_as_transformers_decodes_them(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed, scale = random_bytes(64, 64).view(torch.int8), torch.arange(256, dtype=torch.uint8).view(64, 4)
    scale = scale.view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(packed, scale)
    values = whole(found(mx.find, tmp_path, {"a.weight": packed, "a.scale": scale}).code)
    assert torch.equal(bits(values.to(expected.dtype)), bits(expected))


def test_what_is_not_mxfp4_is_left_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": random_bytes(4, 32).view(torch.int8),  # int8 codes with ordinary scales
        "a.weight_scale": torch.ones(4, 1),
        "b.weight_packed": random_bytes(4, 32),  # NVFP4
        "b.weight_scale": random_bytes(4, 4).view(torch.float8_e4m3fn),
        "c.weight": random_bytes(64, 1),
        "d.mask_blocks": torch.ones(3),
    }
    assert list(mx.find(held(tmp_path, tensors), Quantization({"quant_method": "x"}))) == []
    other = {"a.weight": random_bytes(4, 16), "a.weight_scale": random_bytes(4, 1)}
    quark = {"quant_method": "quark", "global_quant_config": {"weight": {"scale_format": "e5m3"}}}
    assert list(mx.find(held(tmp_path, other), Quantization(quark))) == []


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "written again by transformers": (
        {BLOCKS: torch.zeros(2, 32, 8, dtype=torch.bfloat16)},
        f"'{BLOCKS}' is BF16 under the name of codes: transformers wrote it .* save_original_format=False",
    ),
    "no scales": ({BLOCKS: random_bytes(2, 8, 1, 16)}, f"no '{SCALES}', not U8 .2, 8, 1."),
    "scales of other blocks": (
        {BLOCKS: random_bytes(2, 8, 2, 16), SCALES: random_bytes(2, 8, 1)},
        f"'{SCALES}' is U8 .2, 8, 1., not U8 .2, 8, 2.",
    ),
    "six bits": (
        {"a.weight_packed": random_bytes(4, 48), "a.weight_scale": random_bytes(4, 2)},
        "'a.weight_scale' is U8 .4, 2., not a scale for 32 codes each of 'a.weight_packed' U8 .4, 48.",
    ),
    "groups cut short": (
        {"a.weight_packed": random_bytes(4, 20), "a.weight_scale": random_bytes(4, 1)},
        "not a scale for 32 codes each",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_weight_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(mx.find(held(tmp_path, tensors), Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_the_same_bits(tmp_path: Path) -> None:
    linear = {"a.weight_packed": random_bytes(7, 48), "a.weight_scale": random_bytes(7, 3)}
    for tensors in (gpt_oss(3, 40, 96), linear):
        code = found(mx.find, tmp_path, tensors).code
        assert torch.equal(bits(whole(code, "cuda").cpu()), bits(whole(code)))
