"""torchao's tensors against their formulas, and against torchao itself where it is installed, bit for bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import torchao
from pipeline.ground.codes.code import Found, Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits as bits_of
from tests.ground.codes.holding import gaussian, held, in_tiles, random_bytes, whole

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KINDS = ["Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"]


class Layer:
    """Random codes with a scale and perhaps a zero point for each block, and what they mean."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], block: tuple[int, ...], dtype: str = "bfloat16",
        zeros: str | None = None, scales: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        grid = tuple(size // of for size, of in zip(shape, block, strict=True))
        generator = torch.Generator().manual_seed(1)
        self.kind, self.shape, self.block, self.dtype = kind, shape, block, dtype
        raw = random_bytes(*shape)
        self.codes = raw.view(torch.float8_e4m3fn) if kind == "Float8Tensor" else raw.view(torch.int8)
        self.scale = torch.randn(grid, generator=generator).to(scales)
        self.zero: Tensor | None = None
        if zeros == "int8":
            self.zero = torch.randint(-128, 128, grid, generator=generator).to(torch.int8)
        elif zeros:
            self.zero = (30 * torch.randn(grid, generator=generator)).to(DTYPES[zeros])

    def weight(self) -> Tensor:
        """As torchao's operators compute it."""

        def spread(grid: Tensor) -> Tensor:
            for dimension, of in enumerate(self.block):
                grid = grid.repeat_interleave(of, dimension)
            return grid

        dtype = DTYPES[self.dtype]
        if self.kind == "Float8Tensor":
            return (self.codes.float() * spread(self.scale)).to(dtype)
        values = self.codes.to(dtype)
        values = values if self.zero is None else values - spread(self.zero).to(dtype)
        return (values * spread(self.scale)).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        parts = {"qdata": self.codes, "scale": self.scale, "zero_point": self.zero}
        return {f"a._weight_{part}": tensor for part, tensor in parts.items() if tensor is not None}

    def metadata(self, **data: Any) -> dict[str, str]:
        told = {"block_size": list(self.block), "dtype": {"_type": "torch.dtype", "_data": self.dtype}}
        return {
            "a.weight": json.dumps({"_type": self.kind, "_data": told | data}),
            "tensor_names": '["a.weight"]',
        }


def found(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Found:
    entries = held(folder, tensors)
    (one,) = torchao.find(entries, Quantization({"quant_method": "torchao"}, metadata=metadata))
    assert {entry.name for entry in one.code.entries} == set(entries)
    return one


BLOCKS = [
    ((24, 64), (1, 64)),
    ((24, 64), (24, 64)),
    ((24, 64), (1, 32)),
    ((24, 64), (8, 16)),
    ((5, 7), (1, 7)),
]
STACKS = [((3, 8, 32), (1, 1, 32)), ((4, 6, 32), (2, 3, 16)), ((3, 8, 32), (3, 8, 32))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [None, "int8"])
@pytest.mark.parametrize(("shape", "block"), BLOCKS + STACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_codes_decode_by_the_formula_whole_and_in_tiles(
    tmp_path: Path, kind: str, shape: tuple[int, ...], block: tuple[int, ...], zeros: str | None, dtype: str
) -> None:
    layer = Layer(kind, shape, block, dtype, None if kind == "Float8Tensor" else zeros)
    one = found(tmp_path, layer.tensors(), layer.metadata())
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", shape, "a._weight_qdata")
    values = whole(one.code)
    assert torch.equal(bits_of(values.to(DTYPES[dtype])), bits_of(layer.weight()))
    assert torch.equal(bits_of(in_tiles(one.code, [1, 5, 9, 20])), bits_of(values))
    assert pickle.loads(pickle.dumps(one.code)) == one.code


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_points_that_are_not_whole_are_subtracted_in_the_dtype(tmp_path: Path, dtype: str) -> None:
    layer = Layer("IntxUnpackedToInt8Tensor", (24, 64), (1, 32), dtype, dtype, DTYPES[dtype])
    values = whole(found(tmp_path, layer.tensors(), layer.metadata()).code)
    assert torch.equal(values.to(DTYPES[dtype]), layer.weight())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torchao_flattens_decodes_as_torchao_dequantizes_it(tmp_path: Path, dtype: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    weight = gaussian(32, 64).to(DTYPES[dtype])
    row, whole_tensor, group = quantization.PerRow(), quantization.PerTensor(), quantization.PerGroup(32)
    symmetric, affine = quantization.MappingType.SYMMETRIC, quantization.MappingType.ASYMMETRIC
    made = {
        "a.weight": quantization.Int8Tensor.from_hp(weight, row),
        "b.weight": quantization.Int8Tensor.from_hp(weight, whole_tensor, affine),
        "c.weight": quantization.Int8Tensor.from_hp(weight, group, symmetric),
        "d.weight": quantization.Float8Tensor.from_hp(weight, granularity=row),
        "e.weight": quantization.Float8Tensor.from_hp(weight, granularity=whole_tensor),
        "f.weight": quantization.IntxUnpackedToInt8Tensor.from_hp(
            weight, (1, 16), torch.int4, mapping_type=affine
        ),
        "g.experts": quantization.Int8Tensor.from_hp(weight.view(4, 8, 64), row),
        "h.bias": torch.ones(3),
    }
    tensors, metadata = support.flatten_tensor_state_dict(made)
    entries = held(tmp_path, tensors)
    codes = {f.name: f.code for f in torchao.find(entries, Quantization({}, metadata=metadata))}
    assert set(codes) == set(made) - {"h.bias"}
    assert {e.name for code in codes.values() for e in code.entries} == set(tensors) - {"h.bias"}
    for name, code in codes.items():
        values, expected = whole(code), made[name].dequantize()
        assert torch.equal(bits_of(values.to(expected.dtype)), bits_of(expected))
        assert (values - weight.float().view(code.shape)).norm() < 0.1 * weight.float().norm()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    block = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    shape = tuple(of * data.draw(st.integers(1, 3)) for of in block)
    layer = Layer(kind, shape, block)
    code = found(tmp_path_factory.mktemp("ao"), layer.tensors(), layer.metadata()).code
    cuts = data.draw(st.lists(st.integers(0, 300)))
    assert torch.equal(bits_of(in_tiles(code, cuts).bfloat16()), bits_of(layer.weight()))


def test_activation_scales_go_with_the_codes_and_smoothing_is_refused(tmp_path: Path) -> None:
    layer = Layer("Int8Tensor", (8, 16), (1, 16))
    static = layer.tensors() | {"a._weight_act_quant_scale": torch.ones(1)}
    assert torch.equal(whole(found(tmp_path, static, layer.metadata()).code).bfloat16(), layer.weight())
    smooth = layer.tensors() | {"a._weight_act_pre_scale": torch.ones(16)}
    with pytest.raises(Refused, match=r"'a._weight_act_pre_scale' scales the inputs"):
        found(tmp_path, smooth, layer.metadata())


GOOD = Layer("Int8Tensor", (8, 32), (1, 16), zeros="int8")
FLOATS = Layer("Float8Tensor", (8, 32), (1, 16))
BAD: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "nothing said": (
        GOOD.tensors(),
        {},
        r"'a._weight_qdata' has no description in the metadata .* 'a.weight'",
    ),
    "broken text": (GOOD.tensors(), {"a.weight": "{"}, r"'a._weight_qdata' has no description"),
    "int4": (
        GOOD.tensors(),
        {"a.weight": '{"_type": "Int4Tensor", "_data": {}}'},
        r"is torchao's Int4Tensor; only Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor can be decoded",
    ),
    "no scale": (
        {"a._weight_qdata": GOOD.codes},
        GOOD.metadata(),
        r"does not fit together as Int8Tensor of blocks \[1, 16\]: I8 \[8, 32\]",
    ),
    "other blocks": (
        GOOD.tensors(),
        GOOD.metadata(block_size=[1, 32]),
        r"does not fit together as Int8Tensor of",
    ),
    "other codes": (GOOD.tensors(), FLOATS.metadata(), r"does not fit together as Float8Tensor"),
    "no dtype": (GOOD.tensors(), GOOD.metadata(dtype=None), r"does not fit together as Int8Tensor"),
    "uneven": (
        GOOD.tensors() | {"a._weight_scale": torch.ones(3, 2)},
        GOOD.metadata(),
        r"scale F32 \[3, 2\]",
    ),
    "zeros of floats": (
        FLOATS.tensors() | {"a._weight_zero_point": torch.zeros(8, 2)},
        FLOATS.metadata(),
        r"does not fit together as Float8Tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, metadata, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(torchao.find(held(tmp_path, tensors), Quantization({}, metadata=metadata)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, kind: str) -> None:
    layer = Layer(kind, (24, 64), (8, 16))
    code = found(tmp_path, layer.tensors(), layer.metadata()).code
    assert torch.equal(bits_of(whole(code, "cuda").cpu()), bits_of(whole(code)))
