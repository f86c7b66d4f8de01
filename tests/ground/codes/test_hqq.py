"""HQQ against its formula in its own dtype, and against hqq itself where it is installed, bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import hqq
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits as bits_of
from tests.ground.codes.holding import found, gaussian, held, in_tiles, whole
from tests.ground.codes.streams import random_codes

PACKING = {8: "8bit_u8", 6: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def text(characters: str) -> Tensor:
    """As hqq stores text."""
    return torch.tensor([ord(c) for c in characters], dtype=torch.uint8)


class Layer:
    """Random codes of a layer, as HQQLinear.state_dict names them, and what they mean."""

    def __init__(
        self, bits: int, shape: tuple[int, int], group: int, axis: int, dtype: str = "float16"
    ) -> None:
        total = shape[0] * shape[1]
        self.bits, self.shape, self.axis, self.dtype = bits, shape, axis, dtype
        self.group, self.matrix = group, (total // group, group) if axis else (group, total // group)
        lines = (total // group, 1) if axis else (1, total // group)
        generator = torch.Generator().manual_seed(1)
        self.codes = random_codes(*self.matrix, bits=bits)
        self.zero = (torch.randn(lines, generator=generator) * 2**bits).to(DTYPES[dtype])
        self.scale = (torch.randn(lines, generator=generator) * 0.01).to(DTYPES[dtype])

    def weight(self) -> Tensor:
        """(codes - zero) * scale in the compute dtype, each rounded."""
        return ((self.codes.to(self.zero.dtype) - self.zero) * self.scale).reshape(self.shape)

    def packed(self) -> Tensor:
        """Rows of the matrix in planes, the first in the highest bits."""
        if PACKING[self.bits] == "8bit_u8":
            return self.codes.to(torch.uint8)
        planes = 10 if self.bits == 3 else 8 // self.bits
        full = torch.nn.functional.pad(self.codes, (0, 0, 0, -len(self.codes) % planes))
        shifts = self.bits * torch.arange(planes - 1, -1, -1)
        words = (full.view(planes, -1, full.shape[1]) << shifts[:, None, None]).sum(0)
        return words.to(torch.int32 if self.bits == 3 else torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """As the file has them."""
        return {
            "a.W_q": self.packed(),
            "a.scale": self.scale,
            "a.zero": self.zero,
            "a.nbits": torch.tensor(self.bits, dtype=torch.int32),
            "a.group_size": torch.tensor(self.group, dtype=torch.int32),
            "a.shape": torch.tensor(self.shape),
            "a.axis": torch.tensor(self.axis, dtype=torch.int32),
            "a.packing": text(PACKING[self.bits]),
            "a.compute_dtype": text(f"torch.{self.dtype}"),
            "a.view_as_float": torch.tensor(0, dtype=torch.uint8),
            "a.quant_scale": torch.tensor(0, dtype=torch.uint8),
            "a.encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        }


SHAPES = [((64, 64), 64), ((32, 24), 16), ((64, 40), 64), ((16, 120), 8)]  # groups of whole and of part rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("bits", PACKING)
def test_random_codes_decode_by_the_formula_in_the_compute_dtype(
    tmp_path: Path, bits: int, shape: tuple[int, int], group: int, axis: int, dtype: str
) -> None:
    layer = Layer(bits, shape, group, axis, dtype)
    one = found(hqq.find, tmp_path, layer.tensors())
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", shape, "a.W_q")
    values = whole(one.code)
    assert torch.equal(bits_of(values), bits_of(layer.weight().float()))
    assert torch.equal(bits_of(in_tiles(one.code, [1, 5, 11, 17])), bits_of(values))
    assert torch.equal(values.to(DTYPES[dtype]).float(), values)  # rounding again changes nothing
    assert pickle.loads(pickle.dumps(one.code)) == one.code


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", PACKING)
def test_what_hqq_quantizes_decodes_as_hqq_decodes_it(tmp_path: Path, bits: int, axis: int) -> None:
    module = pytest.importorskip("hqq.core.quantize")
    weight = gaussian(64, 128)
    for dtype in DTYPES.values():
        packed, meta = module.Quantizer.quantize(
            weight, nbits=bits, group_size=64, axis=axis, optimize=False, compute_dtype=dtype, device="cpu"
        )
        meta["compute_dtype"] = dtype
        packed, meta = module.Quantizer.cpu(packed, meta)
        expected = module.Quantizer.dequantize(packed, meta)
        encode = module.encode_safetensor_type
        told = {name: encode(value) for name, value in meta.items()}
        tensors = {f"a.{name}": tensor for name, tensor in ({"W_q": packed} | told).items()}
        values = whole(found(hqq.find, tmp_path, tensors).code)
        assert torch.equal(values.to(dtype), expected)
        assert bits == 1 or (values - weight).norm() < 2.0 ** (1 - bits) * weight.norm()


def test_one_rounding_would_give_other_bits(tmp_path: Path) -> None:
    layer = Layer(4, (64, 64), 64, 1)
    once = (layer.codes - layer.zero.float()) * layer.scale.float()
    values = whole(found(hqq.find, tmp_path, layer.tensors()).code)
    assert not torch.equal(values.half(), once.half().view(64, 64))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_viewed_as_floats_are_the_same_bytes(tmp_path: Path, bits: int) -> None:
    layer = Layer(bits, (32, 64), 64, 1)
    tensors = layer.tensors() | {"a.view_as_float": torch.tensor(1, dtype=torch.uint8)}
    tensors["a.W_q"] = tensors["a.W_q"].view(torch.float16)
    assert torch.equal(whole(found(hqq.find, tmp_path, tensors).code), layer.weight().float())


def test_scales_of_another_dtype_are_rounded_to_the_compute_dtype(tmp_path: Path) -> None:
    layer = Layer(4, (32, 64), 64, 1, "float32")
    tensors = layer.tensors() | {"a.compute_dtype": text("torch.bfloat16")}
    layer.scale, layer.zero = layer.scale.bfloat16(), layer.zero.bfloat16()
    assert torch.equal(whole(found(hqq.find, tmp_path, tensors).code), layer.weight().float())
    del tensors["a.compute_dtype"]  # then that of the scales
    layer.scale, layer.zero = tensors["a.scale"], tensors["a.zero"]
    assert torch.equal(whole(found(hqq.find, tmp_path, tensors).code), layer.weight())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.sampled_from([8, 4, 3, 2]), axis=st.integers(0, 1))
def test_any_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, bits: int, axis: int
) -> None:
    rows, columns, group = 4 * data.draw(st.integers(1, 12)), 8 * data.draw(st.integers(1, 6)), 8
    layer = Layer(bits, (rows, columns), group * data.draw(st.sampled_from([1, 2, 4])), axis)
    if rows * columns % (4 * layer.group):
        return
    code = found(hqq.find, tmp_path_factory.mktemp("hqq"), layer.tensors()).code
    assert torch.equal(in_tiles(code, data.draw(st.lists(st.integers(0, rows)))), layer.weight().float())


def changed(**parts: Tensor | None) -> dict[str, Tensor]:
    """A good layer with some tensors changed or, if None, taken away."""
    tensors = {
        **Layer(4, (32, 64), 64, 1).tensors(),
        **{f"a.{part}": tensor for part, tensor in parts.items()},
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown packing": (changed(packing=text("4bit_hexagon")), r"is HQQ of packing '4bit_hexagon'"),
    "unknown dtype": (changed(compute_dtype=text("torch.int8")), r"is HQQ of packing '4bit_u8' computed in"),
    "no scale": (changed(scale=None), r"'a.W_q' is HQQ, but stands without scale"),
    "quantized scales": (changed(quant_scale=torch.tensor(1)), r"HQQ with quantized scales or zero points"),
    "unknown part": (changed(meta_scale=torch.ones(1)), r"HQQ with 'meta_scale', which this version cannot"),
    "wrong shape": (changed(shape=torch.tensor([32, 32])), r"as HQQ 4bit_u8 of shape \[32, 32\]"),
    "negative shape": (changed(shape=torch.tensor([-32, -64])), r"does not fit together as HQQ 4bit_u8"),
    "wrong zeros": (changed(zero=torch.ones(31, 1)), r"does not fit together .* zero F32 \[31, 1\]"),
    "third axis": (changed(axis=torch.tensor(2)), r"does not fit together as HQQ"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(hqq.find(held(tmp_path, tensors), Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, dtype: Any) -> None:
    code = found(hqq.find, tmp_path, Layer(4, (64, 64), 16, 0, dtype).tensors()).code
    assert torch.equal(whole(code, "cuda").cpu(), whole(code))
