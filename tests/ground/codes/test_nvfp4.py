"""NVFP4 against compressed-tensors and the formulas in numpy, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import nvfp4
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits, found, gaussian, held, in_tiles, random_bytes, whole

E4M3 = torch.float8_e4m3fn
LEVELS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CT = ("a.weight_packed", "a.weight_scale", "a.weight_global_scale")
MODELOPT = ("a.weight", "a.weight_scale", "a.weight_scale_2")
FUSED = ("experts.x", "experts.x_weight_scale", "experts.x_weight_scale_2")


def parts(*shape: int, whole: Any = (1,)) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales (NaN among them) and a scale of the tensor for a weight of this shape."""
    *outer, rows, columns = shape
    scale = random_bytes(*outer, rows, columns // 16, seed=1).view(E4M3)
    of_tensor = torch.rand(whole, generator=torch.Generator().manual_seed(2)) + 0.1
    return random_bytes(*outer, rows, columns // 2), scale, of_tensor


def levels_of(packed: Tensor) -> Any:
    raw = packed.numpy()
    return LEVELS[np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)]


def formula(packed: Tensor, scale: Tensor, of_tensor: Tensor, divides: bool) -> Tensor:
    """In numpy: the scale is rounded to float32 before it is multiplied."""
    number = of_tensor.numpy().reshape(-1, 1, 1) if of_tensor.numel() > 1 else of_tensor.numpy().reshape(())
    of_block = scale.float().numpy() / number if divides else scale.float().numpy() * number
    return torch.from_numpy(levels_of(packed) * np.repeat(of_block, 16, -1))


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(0, 3),
    rows=st.integers(1, 30),
    groups=st.integers(1, 4),
    divides=st.booleans(),
    each=st.booleans(),
    cuts=st.lists(st.integers(0, 100), max_size=4),
)
def test_any_shape_decodes_by_the_formula_whole_and_in_any_tiles(
    experts: int, rows: int, groups: int, divides: bool, each: bool, cuts: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    outer = (experts,) if experts else ()
    three = parts(*outer, rows, groups * 16, whole=outer if each else ())
    tensors = dict(zip(CT if divides else MODELOPT, three, strict=True))
    one = found(nvfp4.find, tmp_path_factory.mktemp("held"), tensors)
    assert (one.name, one.code.shape) == ("a.weight", (*outer, rows, groups * 16))
    expected = formula(*three, divides)
    assert torch.equal(bits(whole(one.code)), bits(expected))
    assert torch.equal(bits(in_tiles(one.code, cuts)), bits(expected))


def decompressed(tensors: dict[str, Tensor]) -> Tensor:
    """By compressed-tensors."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    decoder = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    values = decoder.decompress(tensors, scheme())["weight"]
    assert isinstance(values, Tensor)
    return values


def scheme() -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("shape", [(64, 128), (5, 48), (1, 16)])
def test_random_codes_decode_as_compressed_tensors_decodes_them(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    tensors = dict(zip(CT, parts(*shape), strict=True))
    for number in (0.3, 1.0, 1234.567, 7e-5):
        tensors["a.weight_global_scale"] = torch.tensor([number])
        expected = decompressed({name.removeprefix("a."): tensor for name, tensor in tensors.items()})
        values = whole(found(nvfp4.find, tmp_path, tensors).code)
        assert torch.equal(bits(values.to(expected.dtype)), bits(expected))


def test_a_quantized_gaussian_decodes_as_compressed_tensors_decodes_it(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = gaussian(48, 128).bfloat16()
    of_tensor = (448 * 6 / weight.abs().max()).float().reshape(1)
    of_block = (of_tensor * weight.view(48, 8, 16).abs().amax(-1) / 6).to(E4M3).bfloat16()
    encoder = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    dense = {"weight": weight, "weight_scale": of_block, "weight_global_scale": of_tensor}
    tensors = encoder.compress(dense, scheme())
    expected = decompressed(tensors)
    values = whole(found(nvfp4.find, tmp_path, {f"a.{n}": t for n, t in tensors.items()}).code)
    assert torch.equal(values.to(expected.dtype), expected)
    assert (values - weight).norm() < weight.norm() / 4


def test_a_quotient_is_not_a_product_with_the_reciprocal(tmp_path: Path) -> None:
    packed, scale, of_tensor = parts(64, 128)
    by_quotient = whole(
        found(nvfp4.find, tmp_path, dict(zip(CT, (packed, scale, of_tensor), strict=True))).code
    )
    product = (packed, scale, 1 / of_tensor)
    by_product = whole(found(nvfp4.find, tmp_path, dict(zip(MODELOPT, product, strict=True))).code)
    assert not torch.equal(bits(by_quotient), bits(by_product))
    assert torch.equal(bits(by_product), bits(formula(*product, False)))


def test_every_byte_is_two_codes_low_nibble_first(tmp_path: Path) -> None:
    one = torch.ones(16, 2).to(E4M3)
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    tensors = {"a.weight": packed, "a.weight_scale": one.repeat(1, 1), "a.weight_scale_2": torch.tensor(1.0)}
    pairs = whole(found(nvfp4.find, tmp_path, tensors).code).view(256, 2).tolist()
    assert pairs == [[LEVELS[byte & 15], LEVELS[byte >> 4]] for byte in range(256)]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("shape", [(3, 48, 5), (2, 16, 40), (1, 32, 1)])
def test_fused_experts_of_modelopt_are_packed_along_their_inputs(
    tmp_path: Path, shape: tuple[int, int, int], each: bool
) -> None:
    experts, inputs, outputs = shape
    packed, scale, of_tensor = parts(experts, outputs, inputs, whole=(experts,) if each else ())
    expected = formula(packed, scale, of_tensor, False).transpose(1, 2)
    lying = (
        packed.transpose(1, 2),
        scale.view(torch.uint8).transpose(1, 2).contiguous().view(E4M3),
        of_tensor,
    )
    one = found(nvfp4.find, tmp_path, dict(zip(FUSED, lying, strict=True)))
    assert (one.name, one.code.shape, one.code.grain) == ("experts.x", shape, 16)
    assert torch.equal(bits(whole(one.code)), bits(expected))
    assert torch.equal(bits(in_tiles(one.code, [16, 20, 50, 90])), bits(expected))


def test_what_is_not_nvfp4_is_left_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": gaussian(4, 4),
        "b.weight_packed": random_bytes(4, 16),  # MXFP4
        "b.weight_scale": random_bytes(4, 1),
        "c.weight": random_bytes(8, 1),
    }
    assert list(nvfp4.find(held(tmp_path, tensors), Quantization({"quant_method": "modelopt"}))) == []


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "scales of 32": (
        {"a.weight_scale": random_bytes(6, 2).view(E4M3)},
        r"'a.weight_scale' is F8_E4M3 \[6, 2\], not a scale for 16 codes each of \[6, 32\] bytes",
    ),
    "scales of another dtype": ({"a.weight_scale": random_bytes(6, 4)}, r"is U8 \[6, 4\], not F8_E4M3"),
    "many scales of the tensor": (
        {"a.weight_scale_2": torch.ones(6)},
        r"'a.weight_scale_2' is F32 \[6\], not one float32",
    ),
    "scaled inputs": ({"a.pre_quant_scale": torch.ones(64)}, "only together with 'a.pre_quant_scale'"),
    "a low rank beside": ({"a.svdquant_lora_a": torch.ones(2, 64)}, "together with 'a.svdquant_lora_a'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_weight_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, sentence = BAD[case]
    entries = held(tmp_path, dict(zip(MODELOPT, parts(6, 64), strict=True)) | change)
    with pytest.raises(Refused, match=sentence):
        list(nvfp4.find(entries, Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("names", [CT, MODELOPT])
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, names: tuple[str, ...]) -> None:
    code = found(nvfp4.find, tmp_path, dict(zip(names, parts(7, 96), strict=True))).code
    assert torch.equal(bits(whole(code, "cuda").cpu()), bits(whole(code)))
