"""GPTQ against the formula, bit for bit; the packing is written anew from the formats' descriptions.

gptqmodel's own `pack_original` and `dequantize_weight`, and AutoRound's packers, run apart from their
packages, agreed on 4 million elements of every width when this was written.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import gptq
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import found, gaussian, held, in_tiles, whole
from tests.ground.codes.streams import planes, quantized, random_codes, random_scales, stream

V2 = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
SHAPES = [
    (64, 32, 32),
    (128, 96, 128),
    (160, 64, 32),
    (96, 32, 64),
]  # inputs, outputs, group (the last one short)


def order(inputs: int, group: int, shuffled: bool) -> Tensor:
    """The group of each input."""
    groups = torch.arange(inputs) // group
    return groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(2))] if shuffled else groups


class Layer:
    """Random codes, zero points and scales of a layer, and what they mean."""

    def __init__(
        self, bits: int, inputs: int, outputs: int, group: int, shuffled: bool = False, low: int = 0
    ):
        self.bits, self.g_idx = bits, order(inputs, group, shuffled)
        groups = -(-inputs // group)
        self.codes = random_codes(outputs, inputs, bits=bits)
        self.zeros = random_codes(groups, outputs, bits=bits, seed=3, low=low)
        self.scales = random_scales(groups, outputs)

    def weight(self) -> Tensor:
        """(outputs, inputs) float16, multiplied in float16 as the reference does."""
        zeros, scales = self.zeros[self.g_idx].t(), self.scales[self.g_idx].t()
        return scales * (self.codes - zeros).half()

    def tensors(self, less: int = 0, packed: Any = stream) -> dict[str, Tensor]:
        """As the file has them; zero points less `less`."""
        return {
            "a.qweight": packed(self.codes, self.bits).t(),
            "a.qzeros": packed(self.zeros - less, self.bits),
            "a.scales": self.scales,
            "a.g_idx": self.g_idx.int(),
        }


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_codes_decode_by_the_formula_whole_and_in_tiles(
    tmp_path: Path, bits: int, shape: tuple[int, int, int], shuffled: bool
) -> None:
    layer = Layer(bits, *shape, shuffled)
    one = found(gptq.find, tmp_path, layer.tensors(), V2)
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", (shape[1], shape[0]), "a.qweight")
    told = "act-order" if shuffled and shape[2] < shape[0] else f"groups of {shape[2]}"
    assert one.code.describe == f"GPTQ {bits} bit, {told}"
    assert torch.equal(whole(one.code).half(), layer.weight())
    assert torch.equal(in_tiles(one.code, [1, 2, 9, 30]), whole(one.code))
    assert pickle.loads(pickle.dumps(one.code)) == one.code


@pytest.mark.parametrize(
    "said", [{}, {"checkpoint_format": "gptq"}, {"format": "gptq"}, {"checkpoint_format": None}]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_stores_zero_points_less_one(tmp_path: Path, bits: int, said: dict[str, Any]) -> None:
    layer = Layer(bits, 64, 32, 32, low=1)
    code = found(gptq.find, tmp_path, layer.tensors(less=1), {"quant_method": "gptq"} | said).code
    assert torch.equal(whole(code).half(), layer.weight())


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_zero_points_that_gptqmodel_wrapped_come_back(tmp_path: Path, bits: int, ones: int) -> None:
    layer = Layer(bits, 64, 32, 32)
    tensors = layer.tensors()
    tensors["a.qzeros"] = tensors["a.qzeros"] - ones  # whole words, as it writes version 1
    config = {"quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    assert torch.equal(whole(found(gptq.find, tmp_path, tensors, config).code).half(), layer.weight())
    with pytest.raises(
        Refused, match=rf"stored as {2**bits - 1}, which in version 1 may mean 0 or {2**bits}"
    ):
        found(gptq.find, tmp_path, tensors, {"quant_method": "gptq"})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_planes_of_gptq_p_decode(tmp_path: Path, bits: int) -> None:
    layer = Layer(bits, 96, 64, 32, shuffled=True)
    code = found(gptq.find, tmp_path, layer.tensors(packed=planes), V2 | {"checkpoint_format": "gptq_p"}).code
    assert torch.equal(whole(code).half(), layer.weight())
    assert torch.equal(in_tiles(code, [3, 40]), whole(code))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("packing", "less"), [("auto_round:auto_gptq", 1), ("auto_round", 0), ("auto_round:gptqmodel", 0)]
)
def test_autoround_says_by_its_packing_how_zero_points_are_stored(
    tmp_path: Path, bits: int, packing: str, less: int
) -> None:
    layer = Layer(bits, 64, 32, 32, low=1)
    tensors = layer.tensors(less)
    del tensors["a.g_idx"]
    config = {"quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": 32}
    assert torch.equal(whole(found(gptq.find, tmp_path, tensors, config).code).half(), layer.weight())


def test_one_group_of_all_inputs_is_group_size_minus_1(tmp_path: Path) -> None:
    layer = Layer(4, 64, 32, 64)
    tensors = layer.tensors()
    del tensors["a.g_idx"]
    code = found(gptq.find, tmp_path, tensors, V2 | {"group_size": -1}).code
    assert torch.equal(whole(code).half(), layer.weight())


def test_modules_may_have_bits_and_groups_of_their_own(tmp_path: Path) -> None:
    one, other = Layer(4, 128, 32, 64), Layer(8, 128, 64, 32)
    tensors = {name.replace("a.", "m.0."): t for name, t in one.tensors().items()}
    tensors |= {name.replace("a.", "m.1."): t for name, t in other.tensors().items()}
    tensors |= {"m.2.weight": torch.ones(3, 3), "m.1.bias": torch.ones(64)}  # what the config leaves alone
    config = V2 | {
        "bits": 4,
        "group_size": 64,
        "dynamic": {r"+:m\.1": {"bits": 8, "group_size": 32}, r"-:m\.2": {}},
    }
    weights = {f.name: f.code for f in gptq.find(held(tmp_path, tensors), Quantization(config))}
    assert set(weights) == {"m.0.weight", "m.1.weight"}
    assert torch.equal(whole(weights["m.0.weight"]).half(), one.weight())
    assert torch.equal(whole(weights["m.1.weight"]).half(), other.weight())


def test_symmetric_zero_points_and_scales_in_another_shard_decode(tmp_path: Path) -> None:
    layer = Layer(4, 64, 32, 32)
    layer.zeros[:] = 8
    tensors = layer.tensors(less=1)
    entries = held(tmp_path, {"a.qweight": tensors.pop("a.qweight")}, tensors)
    (one,) = gptq.find(
        entries, Quantization({}, {"bits": 4, "group_size": 32})
    )  # an old quantize_config.json
    assert torch.equal(whole(one.code).half(), layer.weight())


def test_a_quantized_gaussian_comes_back_near_itself(tmp_path: Path) -> None:
    weight = gaussian(64, 128)
    codes, scales, zeros = quantized(weight, 4, 32)
    layer = Layer(4, 128, 64, 32)
    layer.codes, layer.scales, layer.zeros = codes, scales.t(), zeros.t()
    values = whole(found(gptq.find, tmp_path, layer.tensors(), V2).code)
    assert torch.equal(values.half(), layer.weight())
    assert (values - weight).norm() < 0.1 * weight.norm()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=st.sampled_from([2, 3, 4, 8]), shuffled=st.booleans())
def test_any_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, bits: int, shuffled: bool
) -> None:
    inputs, outputs = (32 * data.draw(st.integers(1, 4)) for _ in range(2))
    group = data.draw(st.sampled_from([32, 64, inputs]))
    layer = Layer(bits, inputs, outputs, group, shuffled)
    code = found(gptq.find, tmp_path_factory.mktemp("gptq"), layer.tensors(), V2).code
    assert torch.equal(in_tiles(code, data.draw(st.lists(st.integers(0, outputs)))).half(), layer.weight())


def changed(**parts: Tensor | None) -> dict[str, Tensor]:
    """A good layer with some tensors changed or, if None, taken away."""
    tensors = Layer(4, 64, 32, 32, low=1).tensors(less=1) | {f"a.{part}": t for part, t in parts.items()}  # type: ignore[dict-item]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "version 2 zeros": (
        changed(qzeros=torch.full((2, 4), -0x77777778, dtype=torch.int32)),
        {},
        r"'a.qzeros' holds 8 throughout, .* version 2 .* checkpoint_format None means version 1",
    ),
    "version 1 zeros": (
        changed(qzeros=torch.full((2, 4), 0x77777777, dtype=torch.int32)),
        {"checkpoint_format": "gptq_v2"},
        r"'a.qzeros' holds 7 throughout, .* checkpoint_format 'gptq_v2' means version 2: one is wrong",
    ),
    "marlin": (
        changed(),
        {"checkpoint_format": "marlin"},
        "checkpoint_format 'marlin' is laid out for one kernel",
    ),
    "old marlin": (
        changed(),
        {"is_marlin_format": True},
        "checkpoint_format 'marlin' is laid out for one kernel",
    ),
    "rotated": (changed(), {"rotation": "hadamard"}, "its weights are rotated"),
    "no scales": (changed(scales=None), {}, "'a.qweight' stands without its scales"),
    "wrong bits": (
        changed(),
        {"bits": 8},
        r"'a.qweight' does not fit together as GPTQ of 8 bits: .*qweight I32 \[8, 32\]",
    ),
    "wrong grid": (changed(scales=torch.ones(3, 32)), {}, r"does not fit together .* scales F32 \[3, 32\]"),
    "a group too many": (
        changed(g_idx=torch.full((64,), 2, dtype=torch.int32)),
        {},
        "'a.g_idx' names groups 2 to 2",
    ),
    "an empty order": (
        changed(g_idx=torch.zeros(64, dtype=torch.int32)),
        {},
        "'a.g_idx' is all zero though there are 2",
    ),
    "other groups": (
        changed(g_idx=None),
        {"quant_method": "gptq", "group_size": 128},
        r"64 inputs in 2 groups",
    ),
    "paroquant": (
        changed(theta=torch.ones(2)),
        {},
        "'a.qweight' stands beside 'theta', which no GPTQ layer has",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_told_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, config, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(gptq.find(held(tmp_path, tensors), Quantization(config)))


def test_an_embedding_is_refused_for_it_is_laid_out_otherwise(tmp_path: Path) -> None:
    tensors = {name.replace("a.", "model.embed_tokens."): t for name, t in changed().items()}
    with pytest.raises(Refused, match=r"embed_tokens.qweight' is a GPTQ embedding"):
        list(gptq.find(held(tmp_path, tensors), Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, bits: int) -> None:
    code = found(gptq.find, tmp_path, Layer(bits, 128, 64, 32, shuffled=True).tensors(), V2).code
    assert torch.equal(whole(code, "cuda").cpu(), whole(code))
