"""AWQ against the formula, bit for bit, and against compressed-tensors' converter where that is installed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import awq, gptq
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import found, gaussian, held, in_tiles, random_bytes, whole
from tests.ground.codes.streams import interleaved, quantized, random_codes, random_scales, stream

GEMM = {"quant_method": "awq", "bits": 4, "version": "gemm"}
SHAPES = [(128, 64, 32), (256, 96, 128), (512, 8, 64), (384, 40, 128), (96, 24, 96)]  # inputs, outputs, group


class Layer:
    """Codes, zero points and scales, outputs first, and what they mean."""

    def __init__(self, inputs: int, outputs: int, group: int) -> None:
        self.group = group
        self.codes = random_codes(outputs, inputs, bits=4)
        self.zeros = random_codes(outputs, inputs // group, bits=4, seed=3)
        self.scales = random_scales(outputs, inputs // group)

    def weight(self) -> Tensor:
        """(outputs, inputs) float16, multiplied in float16 as the reference does."""
        zeros, scales = (t.repeat_interleave(self.group, 1) for t in (self.zeros, self.scales))
        return (self.codes - zeros).half() * scales

    def gemm(self) -> dict[str, Tensor]:
        packed = interleaved(self.codes.t()), interleaved(self.zeros.t())
        return {"a.qweight": packed[0], "a.qzeros": packed[1], "a.scales": self.scales.t()}

    def gemv(self) -> dict[str, Tensor]:
        multiple = 8 * max(128 // self.group, 1)
        fill = -self.zeros.shape[1] % multiple
        zeros, scales = (torch.nn.functional.pad(t, (0, fill), value=1) for t in (self.zeros, self.scales))
        return {"a.qweight": stream(self.codes, 4), "a.qzeros": stream(zeros, 4), "a.scales": scales}


@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_decodes_by_the_formula_whole_and_in_tiles(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape)
    one = found(awq.find, tmp_path, layer.gemm(), GEMM | {"group_size": shape[2]})
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", (shape[1], shape[0]), "a.qweight")
    assert (one.code.describe, one.code.grain) == (f"AWQ gemm 4 bit, groups of {shape[2]}", 8)
    assert torch.equal(whole(one.code).half(), layer.weight())
    assert torch.equal(in_tiles(one.code, [8, 16, 30]), whole(one.code))
    assert pickle.loads(pickle.dumps(one.code)) == one.code


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scales_as_small_as_their_dtype_goes_decode_to_the_formulas_bits(
    tmp_path: Path, kind: torch.dtype
) -> None:
    layer = Layer(128, 64, 32)
    sizes = torch.arange(layer.scales.numel()).remainder(270).sub(149).view(layer.scales.shape)
    generator = torch.Generator().manual_seed(5)
    layer.scales = torch.ldexp(torch.randn(sizes.shape, generator=generator), sizes).to(kind)
    expected = (layer.codes - layer.zeros.repeat_interleave(32, 1)) * layer.scales.float().repeat_interleave(
        32, 1
    )
    values = whole(found(awq.find, tmp_path, layer.gemm(), GEMM | {"group_size": 32}).code)
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (1024, 8, 32), (2048, 16, 128), (1024, 16, 1024)])
def test_gemv_decodes_by_the_formula_whole_and_in_tiles(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    layer = Layer(*shape)
    config = GEMM | {"version": "gemv", "group_size": shape[2] if shape[2] < shape[0] else -1}
    one = found(awq.find, tmp_path, layer.gemv(), config)
    assert (one.code.describe, one.code.grain) == (f"AWQ gemv 4 bit, groups of {shape[2]}", 1)
    assert torch.equal(whole(one.code).half(), layer.weight())
    assert torch.equal(in_tiles(one.code, [1, 3, 7]), whole(one.code))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_words_decode_as_compressed_tensors_converts_them(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    inputs, outputs, group = shape
    tensors = Layer(*shape).gemm()
    tensors["a.qweight"] = random_bytes(inputs, outputs // 2).view(torch.int32)
    converter = module.AutoAWQConverter(group_size=group)
    codes, scales, zeros = converter._convert_gemm_module(
        *(tensors[f"a.{p}"] for p in ("qweight", "scales", "qzeros"))
    )
    expected = (codes - zeros.repeat_interleave(group, 1)).half() * scales.repeat_interleave(group, 1)
    code = found(awq.find, tmp_path, tensors, GEMM).code
    assert torch.equal(whole(code).half(), expected)


@pytest.mark.parametrize(
    "config",
    [
        {},  # the shapes say gemm without a word
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32},
    ],
)
def test_gemm_is_known_by_its_shapes_whoever_wrote_it(tmp_path: Path, config: dict[str, Any]) -> None:
    layer = Layer(128, 64, 32)
    entries = held(tmp_path, layer.gemm() | {"b.weight": torch.ones(2, 2), "a.bias": torch.ones(64)})
    assert list(gptq.find(entries, Quantization(config))) == []
    (one,) = awq.find(entries, Quantization(config))
    assert torch.equal(whole(one.code).half(), layer.weight())


def test_a_quantized_gaussian_comes_back_near_itself(tmp_path: Path) -> None:
    weight, layer = gaussian(64, 128), Layer(128, 64, 32)
    layer.codes, layer.scales, layer.zeros = quantized(weight, 4, 32)
    for tensors, version in ((layer.gemm(), "gemm"), (layer.gemv(), "gemv")):
        config = GEMM | {"version": version, "group_size": 32}
        values = whole(found(awq.find, tmp_path, tensors, config).code)
        assert torch.equal(values.half(), layer.weight())
        assert (values - weight).norm() < 0.1 * weight.norm()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), groups=st.integers(1, 3), words=st.integers(1, 6), group=st.sampled_from([32, 64, 96]))
def test_any_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, groups: int, words: int, group: int
) -> None:
    layer = Layer(groups * group, words * 8, group)
    code = found(awq.find, tmp_path_factory.mktemp("awq"), layer.gemm(), GEMM | {"group_size": group}).code
    assert torch.equal(in_tiles(code, data.draw(st.lists(st.integers(0, words * 8)))).half(), layer.weight())


def changed(**parts: Tensor | None) -> dict[str, Tensor]:
    """A good gemm layer with some tensors changed or, if None, taken away."""
    tensors = {**Layer(128, 64, 32).gemm(), **{f"a.{part}": tensor for part, tensor in parts.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


HALVES = {"qweight": torch.zeros(16, 128).short(), "scales": torch.ones(8, 64).half()}
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "gemv_fast": (
        changed(**HALVES, qzeros=torch.ones(8, 64).half()),
        {},
        "'a.qweight' is AWQ packed for gemv_fast kernels alone; give the same model's gemm checkpoint",
    ),
    "llm-awq": (
        changed(**HALVES, qzeros=None, scaled_zeros=torch.ones(8, 64).half()),
        {},
        "'a.qweight' is AWQ packed for llm-awq kernels alone",
    ),
    "marlin": (
        {"a.qweight": torch.zeros(8, 128).int(), "a.scales": torch.ones(4, 64)},
        GEMM | {"version": "marlin"},
        "'a.qweight' is AWQ packed for marlin kernels alone",
    ),
    "no zeros": (
        changed(qzeros=None),
        GEMM,
        r"does not fit together as AWQ of 4 bits, gemm or gemv: qweight I32",
    ),
    "wrong grid": (
        changed(scales=torch.ones(3, 64)),
        GEMM,
        r"does not fit together as AWQ .* scales F32 \[3, 64\]",
    ),
    "wrong group": (changed(), GEMM | {"group_size": 128}, "does not fit together as AWQ of 4 bits"),
    "paroquant": (
        changed(theta=torch.ones(2)),
        GEMM,
        "'a.qweight' stands beside 'theta', which no AWQ layer has",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_other_packings_and_broken_layers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, config, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(awq.find(held(tmp_path, tensors), Quantization(config)))


def test_layers_of_gptq_are_left_alone(tmp_path: Path) -> None:
    words = torch.zeros(16, 64).int()
    tensors = {"a.qweight": words, "a.qzeros": torch.zeros(4, 8).int(), "a.scales": torch.ones(4, 64)}
    assert list(awq.find(held(tmp_path, tensors), Quantization({"quant_method": "gptq"}))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, version: str) -> None:
    tensors = getattr(Layer(256, 96, 128), version)()
    code = found(awq.find, tmp_path, tensors, GEMM | {"version": version, "group_size": 128}).code
    assert torch.equal(whole(code, "cuda").cpu(), whole(code))
