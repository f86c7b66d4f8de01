"""FP8 against compressed-tensors, transformers and the formula in numpy, bit for bit."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import fp8
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits, found, gaussian, held, in_tiles, random_bytes, whole

E4M3 = torch.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Every byte of E4M3, NaN among them."""
    return random_bytes(*shape, seed=seed).view(E4M3)


def scales(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp()


def values_of(raw: Tensor, exponent_bits: int) -> Any:
    """The floats of bytes by the definition of FP8, in numpy; E4M3 has no infinity."""
    byte = raw.view(torch.uint8).numpy().astype(np.int64)
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = byte >> mantissa_bits & 2**exponent_bits - 1, byte & 2**mantissa_bits - 1
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    values = np.where(byte > 127, -1.0, 1.0) * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)
    if exponent_bits == 4:
        values[byte & 127 == 127] = np.nan
    else:
        values[exponent == 31] = np.where(byte > 127, -np.inf, np.inf)[exponent == 31]
        values[(exponent == 31) & (mantissa > 0)] = np.nan
    return values.astype(np.float32)


def blockwise(values: Any, scale: Any, height: int, width: int) -> Tensor:
    """values * scale of its block, the last blocks cut; over the two last dimensions."""
    spread = np.repeat(np.repeat(scale, height, -2), width, -1)[..., : values.shape[-2], : values.shape[-1]]
    with np.errstate(all="ignore"):
        product = values * spread
    assert product.dtype == np.float32
    return torch.from_numpy(product)


def assert_decodes(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], expected: Tensor
) -> None:
    """Found as `a.weight`; after one rounding, whole and in tiles, the bits expected."""
    one = found(fp8.find, folder, tensors, config)
    assert (one.name, one.code.shape) == (one.main.name, tuple(expected.shape))
    for values in (whole(one.code), in_tiles(one.code, [1, 5, 127, 130, 400])):
        assert torch.equal(bits(values.to(expected.dtype)), bits(expected))


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(0, 3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    wide=st.booleans(),
    cuts=st.lists(st.integers(0, 130), max_size=4),
)
def test_any_block_of_any_shape_decodes_by_the_formula_whole_and_in_any_tiles(
    experts: int, rows: int, columns: int, block: tuple[int, int], wide: bool, cuts: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    outer = (experts,) if experts else ()
    weight = random_bytes(*outer, rows, columns).view(torch.float8_e5m2 if wide else E4M3)
    scale = scales(*outer, -(-rows // block[0]), -(-columns // block[1]))
    folder = tmp_path_factory.mktemp("held")
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    code = found(fp8.find, folder, tensors, {"weight_block_size": list(block)}).code
    expected = blockwise(values_of(weight, 5 if wide else 4), scale.numpy(), *block)
    assert torch.equal(bits(whole(code)), bits(expected))
    assert torch.equal(bits(in_tiles(code, cuts)), bits(expected))


RAGGED = [(256, 384), (576, 256), (192, 256), (300, 130), (1, 1), (129, 127)]


@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_blocks_decode_as_compressed_tensors_decodes_them(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Of these transformers 5.23 refuses (576, 256) and gets (192, 256), (300, 130) wrong without a word."""
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
    grid = scales(-(-shape[0] // 128), -(-shape[1] // 128))
    for weight in (codes(*shape), (gaussian(*shape) * 8000).to(E4M3)):
        for dtype in (torch.bfloat16, torch.float32):
            decoder = convert.FP8BlockDequantizer(weight_block_size=(128, 128), dtype=dtype)
            expected = decoder._create_dequantized_weight(weight, grid)
            assert_decodes(tmp_path, {"a.weight": weight, "a.weight_scale_inv": grid}, BLOCK, expected)


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (2, 256, 128)])
def test_whole_blocks_decode_as_transformers_decodes_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, grid = codes(*shape), scales(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    expected = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.bfloat16)
    assert_decodes(tmp_path, {"a.weight": weight, "a.weight_scale_inv": grid}, BLOCK, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("block", [(128, 128), (1, 32)])
def test_scales_that_are_powers_of_two_decode_as_transformers_decodes_them(
    tmp_path: Path, dtype: torch.dtype, block: tuple[int, int]
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    grid = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)  # NaN or infinity at 255
    weight = codes(16 * block[0], 16 * block[1])
    expected = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.bfloat16)
    config = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": "ue8m0"}
    for name in ("a.weight_scale_inv", "a.scale"):
        assert_decodes(tmp_path, {"a.weight": weight, name: grid}, config, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("strategy", "shape", "settings"),
    [
        ("tensor", (1,), {}),
        ("channel", (300, 1), {}),
        ("group", (300, 4), {"group_size": 40}),
        ("block", (3, 2), {"block_structure": [128, 128]}),
    ],
)
def test_every_strategy_decodes_as_compressed_tensors_decodes_it(
    tmp_path: Path, strategy: str, shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight, grid = codes(300, 160), scales(*shape).to(dtype)
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, **settings)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    decoder = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    tensors = {"weight": weight, "weight_scale": grid}
    expected = decoder.decompress(tensors, scheme)["weight"]
    assert expected.dtype == dtype
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": strategy} | settings}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert_decodes(tmp_path, {f"a.{name}": tensor for name, tensor in tensors.items()}, config, expected)


@pytest.mark.parametrize(
    ("names", "shape", "method"),
    [
        (("a.weight", "a.weight_scale_inv"), (), "fp8"),  # Mistral
        (("a.weight", "a.qscale_weight"), (), "fp8"),
        (("a.weight", "a.weight_scale"), (), "modelopt"),
        (("a.weight", "a.weight_scale"), (48, 1), "fbgemm_fp8"),
        (("a.weight", "a.weight_scale"), (48,), "modelopt"),
        (("experts.w13_weight", "experts.w13_weight_scale"), (48, 1), "fp8"),
        (("experts.x", "experts.x_scale_inv"), (48, 1), "fp8"),
        (("experts.x", "experts.x_weight_scale"), (1, 1), "modelopt"),
    ],
)
def test_scales_of_the_whole_or_of_rows_under_all_their_names(
    tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...], method: str
) -> None:
    weight, grid = codes(48, 20), scales(*shape)
    expected = blockwise(values_of(weight, 4), grid.reshape(-1, 1).numpy(), 48 // prod(shape[:1] or (1,)), 20)
    assert_decodes(
        tmp_path, dict(zip(names, (weight, grid), strict=True)), {"quant_method": method}, expected
    )


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1), (3,), (3, 10, 1), (3, 10), (3, 1, 6), (1,), (3, 2, 1)])
def test_scales_of_fused_experts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, grid = codes(3, 10, 6), scales(*shape)
    spread = grid.reshape(*shape, *[1] * (3 - len(shape))).numpy()
    height, width = -(-10 // spread.shape[1]), -(-6 // spread.shape[2])
    if shape == (3, 2, 1):
        height = 8
    expected = blockwise(values_of(weight, 4), spread, height, width)
    tensors = {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": grid}
    assert_decodes(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [8, 8]}, expected)


@pytest.mark.parametrize("shape", [(3, 1, 10), (3, 10, 1)])
@pytest.mark.parametrize("rows", [6, 10])
def test_fbgemm_experts_have_scales_of_columns_also_where_they_stand_like_rows(
    tmp_path: Path, shape: tuple[int, ...], rows: int
) -> None:
    """transformers quantizes Llama 4's experts by their outputs, which are the columns of their weights."""
    weight, grid = codes(3, rows, 10), scales(*shape)
    expected = blockwise(values_of(weight, 4), grid.view(3, 1, 10).numpy(), rows, 1)
    tensors = {"experts.down_proj": weight, "experts.down_proj_scale": grid}
    assert_decodes(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}, expected)


def test_mxfp8_decodes_as_compressed_tensors_decodes_it(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = {"weight": codes(64, 128), "weight_scale": torch.arange(256, dtype=torch.uint8).view(64, 4)}
    args = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**args)
    )
    decoder = compressors.BaseCompressor.get_value_from_registry("mxfp8-quantized")
    expected = decoder.decompress(tensors, scheme)["weight"]
    assert expected.dtype == torch.bfloat16
    named = {f"a.{name}": tensor for name, tensor in tensors.items()}
    assert found(fp8.find, tmp_path, named).code.describe == "MXFP8"
    assert_decodes(tmp_path, named, {}, expected)


def test_a_checkpoint_saved_again_without_its_config_is_still_decoded(tmp_path: Path) -> None:
    """transformers 5.23 writes FP8 with scales and drops quantization_config; reloaded, it is garbage."""
    weight, grid = codes(300, 130), scales(3, 2)
    expected = blockwise(values_of(weight, 4), grid.numpy(), 128, 128)
    assert_decodes(tmp_path, {"a.weight": weight, "a.weight_scale_inv": grid}, {}, expected)


def test_scales_in_another_shard_than_their_codes(tmp_path: Path) -> None:
    weight, grid = codes(300, 130), scales(3, 2)
    entries = held(tmp_path, {"a.weight_scale_inv": grid}, {"a.weight": weight, "b.weight": gaussian(3, 3)})
    (one,) = fp8.find(entries, Quantization(BLOCK))
    assert torch.equal(bits(whole(one.code)), bits(blockwise(values_of(weight, 4), grid.numpy(), 128, 128)))


def test_zero_points_of_zero_go_with_the_codes(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(4, 8), "a.weight_scale": scales(4, 1)}
    expected = whole(found(fp8.find, tmp_path, tensors).code)
    zero = {"a.weight_zero_point": torch.zeros(4, 1).to(E4M3)}
    assert torch.equal(bits(whole(found(fp8.find, tmp_path, tensors | zero).code)), bits(expected))


@pytest.mark.parametrize(
    ("grid", "config", "description"),
    [
        ((3, 2), {}, "FP8 E4M3, a scale per 128x128 block"),
        ((300, 1), {}, "FP8 E4M3, a scale per row"),
        ((1,), {}, "FP8 E4M3, a scale per tensor"),
        ((1, 130), {}, "FP8 E4M3, a scale per column"),
        ((3, 1), {"weight_block_size": [100, 130]}, "FP8 E4M3, a scale per 100 rows"),
    ],
)
def test_a_code_says_what_it_is(
    tmp_path: Path, grid: tuple[int, ...], config: dict[str, Any], description: str
) -> None:
    tensors = {"a.weight": codes(300, 130), "a.weight_scale": scales(*grid)}
    assert found(fp8.find, tmp_path, tensors, config).code.describe == description


def test_scales_plain_weights_and_what_others_write_are_left_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": gaussian(4, 4),
        "b.weight_packed": random_bytes(4, 8),
        "b.weight_scale": codes(4, 1),  # NVFP4's, in FP8 itself
        "c._weight_qdata": codes(4, 4),
        "norm.weight": codes(4),
    }
    for config in ({}, {"quant_method": "torchao"}, BLOCK):
        assert list(fp8.find(held(tmp_path, tensors), Quantization(config))) == []


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "a grid of other blocks": (
        {"a.weight_scale_inv": scales(5, 3)},
        r"'a.weight_scale_inv' is \[5, 3\], which fits neither the whole \[300, 130\], nor its rows, "
        "nor blocks of 128x128$",
    ),
    "a grid transposed": ({"a.weight_scale_inv": scales(2, 3)}, "fits neither"),
    "too few rows": ({"a.weight_scale_inv": scales(299, 1)}, "fits neither"),
    "integer scales": (
        {"a.weight_scale_inv": torch.ones(3, 2, dtype=torch.int32)},
        r"'a.weight' is FP8 and has 'a.weight_scale_inv' \(I32\) beside it, not one scale of F32",
    ),
    "two scales": (
        {"a.weight_scale_inv": scales(3, 2), "a.weight_scale": scales(1)},
        "has 'a.weight_scale_inv' .F32. and 'a.weight_scale' .F32. beside it",
    ),
    "no scale": ({}, "'a.weight' is FP8 under quant_method fp8, but no scale stands beside it"),
    "an offset": (
        {"a.weight_scale": scales(1), "a.weight_zero_point": torch.ones(1).to(E4M3)},
        "'a.weight_zero_point' is F8_E4M3 .1. and not zero",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_weight_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, sentence = BAD[case]
    entries = held(tmp_path, {"a.weight": codes(300, 130)} | change)
    with pytest.raises(Refused, match=sentence):
        list(fp8.find(entries, Quantization(BLOCK)))


def test_all_that_is_wrong_is_refused_at_once(tmp_path: Path) -> None:
    entries = held(tmp_path, {"a.weight": codes(300, 130), "b.weight": codes(300, 130)})
    with pytest.raises(Refused) as refused:
        list(fp8.find(entries, Quantization(BLOCK)))
    assert len(refused.value.sentences) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_the_same_bits(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(300, 130), "a.weight_scale_inv": scales(3, 2)}
    code = found(fp8.find, tmp_path, tensors).code
    assert torch.equal(bits(whole(code, "cuda").cpu()), bits(whole(code)))
