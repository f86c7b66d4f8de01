"""bitsandbytes NF4 and FP4 against bitsandbytes itself and against the formula in numpy, bit for bit."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import bnb4
from pipeline.ground.codes.bnb4_state import LEVELS
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits, found, gaussian, held, in_tiles, random_bytes, whole

Tensors = dict[str, Tensor]
STORAGE = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def packed(
    shape: tuple[int, ...], kind: str, size: int, nested: bool, storage: str, seed: int = 0
) -> Tensors:
    """A weight of random codes and scales as bitsandbytes writes it."""
    generator = torch.Generator().manual_seed(seed)
    blocks, width = -(-prod(shape) // size), STORAGE[storage].itemsize
    num_bytes = -(-((prod(shape) + 1) // 2) // width) * width
    codes = random_bytes(num_bytes, seed=seed).view(STORAGE[storage]).view(-1, 1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {"a.weight": codes, "a.weight.quant_map": torch.tensor(LEVELS[kind])}
    if nested:
        tensors["a.weight.absmax"] = random_bytes(blocks, seed=seed + 1)
        tensors["a.weight.nested_absmax"] = torch.rand(-(-blocks // 256), generator=generator)
        tensors["a.weight.nested_quant_map"] = 2 * torch.rand(256, generator=generator) - 1
        offset = torch.rand((), generator=generator).item()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["a.weight.absmax"] = torch.randn(blocks, generator=generator).exp()
    return tensors | state_tensor(kind, state)


def state_tensor(kind: str, state: dict[str, Any]) -> Tensors:
    text = bytearray(json.dumps(state).encode())
    return {f"a.weight.quant_state.bitsandbytes__{kind}": torch.frombuffer(text, dtype=torch.uint8)}


def state_of(tensors: Tensors) -> dict[str, Any]:
    (text,) = (bytes(tensor.numpy()) for name, tensor in tensors.items() if "quant_state" in name)
    state = json.loads(text)
    assert isinstance(state, dict)
    return state


def absmax_of(tensors: Tensors) -> Any:
    """The scales of all blocks, in numpy."""
    absmax = tensors["a.weight.absmax"].numpy()
    if "a.weight.nested_absmax" not in tensors:
        return absmax
    state = state_of(tensors)
    outer = np.repeat(tensors["a.weight.nested_absmax"].numpy(), state["nested_blocksize"])[: len(absmax)]
    values = tensors["a.weight.nested_quant_map"].numpy()[absmax] * outer
    return values + np.float32(state["nested_offset"])


def formula(tensors: Tensors) -> Tensor:
    """The weight in float32 by the format's definition, element by element, in numpy."""
    state = state_of(tensors)
    raw = tensors["a.weight"].view(torch.uint8).flatten().numpy()
    codes = np.stack([raw >> 4, raw & 15], 1).flatten()[: prod(state["shape"])]
    scales = np.repeat(absmax_of(tensors), state["blocksize"])[: len(codes)]
    values = np.float32(LEVELS[state["quant_type"]])[codes] * scales
    assert values.dtype == np.float32
    return torch.from_numpy(values).view(state["shape"])


def reference(tensors: Tensors) -> Tensor:
    """As bitsandbytes' pure torch decoder has it: its CPU kernel is no oracle (see below)."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compute
    from bitsandbytes.backends.utils import _get_4bit_code

    state, cpu = state_of(tensors), torch.device("cpu")
    code, dtype = _get_4bit_code(state["quant_type"], cpu), getattr(torch, state["dtype"])
    raw = tensors["a.weight"].view(torch.uint8).flatten()[: (prod(state["shape"]) + 1) // 2]
    absmax = torch.from_numpy(absmax_of(tensors))
    values = getattr(compute, "__wrapped__", compute)(
        raw, absmax, code, state["blocksize"], state["shape"], dtype
    )
    assert isinstance(values, Tensor)
    return values.view(state["shape"])


def quantized(weight: Tensor, kind: str, size: int, nested: bool, storage: str) -> tuple[Tensors, Any]:
    """A weight and its quant_state as bitsandbytes quantizes and writes them."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(
        weight, None, None, size, nested, kind, quant_storage=STORAGE[storage]
    )
    parts = state.as_dict(packed=True)
    return {"a.weight": codes} | {f"a.weight.{name}": part for name, part in parts.items()}, state


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(["nf4", "fp4"]),
    size=st.sampled_from([32, 64, 128, 256, 4096]),
    nested=st.booleans(),
    storage=st.sampled_from(list(STORAGE)),
    cuts=st.lists(st.integers(0, 5000), max_size=4),
)
def test_random_codes_decode_by_the_formula_whole_and_in_any_tiles(
    shape: tuple[int, ...], kind: str, size: int, nested: bool, storage: str, cuts: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    tensors = packed(shape, kind, size, nested, storage)
    one = found(bnb4.find, tmp_path_factory.mktemp("held"), tensors, {"load_in_4bit": True})
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", shape, "a.weight")
    assert torch.equal(bits(whole(one.code)), bits(formula(tensors)))
    assert torch.equal(bits(in_tiles(one.code, cuts)), bits(formula(tensors)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (5, 48), (3, 4304), (7, 13), (1, 1), (33,), (4, 6, 10)])
def test_quantized_gaussians_decode_as_bitsandbytes_decodes_them(
    tmp_path: Path, shape: tuple[int, ...], kind: str, nested: bool
) -> None:
    for size in (32, 64, 4096):
        tensors, _ = quantized(gaussian(*shape).bfloat16(), kind, size, nested, "U8")
        code = found(bnb4.find, tmp_path, tensors).code
        values, expected = whole(code).bfloat16(), reference(tensors)
        assert torch.equal(bits(values), bits(expected))
        assert torch.equal(bits(in_tiles(code, [1, 2, 3]).bfloat16()), bits(expected))
        assert (values - gaussian(*shape)).norm() < gaussian(*shape).norm()  # neither shuffled nor zero


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_storage_and_any_dtype_of_the_weight(tmp_path: Path, storage: str, dtype: torch.dtype) -> None:
    tensors, state = quantized(gaussian(24, 64).to(dtype), "nf4", 64, True, storage)
    assert tensors["a.weight"].dtype == STORAGE[storage]
    values = whole(found(bnb4.find, tmp_path, tensors).code).to(dtype)
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(values, functional.dequantize_4bit(tensors["a.weight"], state))
    assert torch.equal(values, reference(tensors))


@pytest.mark.parametrize("columns", [32, 48, 80, 96, 112, 144, 160, 4304])
def test_blocks_straddle_rows_where_bitsandbytes_kernel_for_avx512_miscounts_them(
    tmp_path: Path, columns: int
) -> None:
    """bitsandbytes 0.50.2 on AVX512 takes columns // blocksize blocks to a row: SigLIP's fc2 has 4304."""
    weight = gaussian(6, columns).bfloat16()
    tensors, state = quantized(weight, "nf4", 64, False, "U8")
    functional = pytest.importorskip("bitsandbytes").functional
    values = whole(found(bnb4.find, tmp_path, tensors).code).bfloat16()
    assert torch.equal(values, reference(tensors))
    state.shape = torch.Size((1, weight.numel()))  # as one row, which its kernel counts rightly
    in_one_row = functional.dequantize_4bit(tensors["a.weight"], state).view(weight.shape)
    assert torch.equal(values, in_one_row)
    state.shape = weight.shape
    kernel = functional.dequantize_4bit(tensors["a.weight"], state)
    assert (values - weight).norm() <= (kernel - weight).norm()


def test_the_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for kind, levels in LEVELS.items():
        assert torch.equal(torch.tensor(levels), functional.get_4bit_type(kind, "cpu"))


def test_every_byte_is_two_codes_high_nibble_first(tmp_path: Path) -> None:
    tensors = packed((2, 256), "nf4", 64, False, "U8")
    tensors["a.weight"] = torch.arange(256, dtype=torch.uint8)[:, None]
    tensors["a.weight.absmax"] = torch.ones(8)
    pairs = whole(found(bnb4.find, tmp_path, tensors).code).view(256, 2).tolist()
    levels = torch.tensor(LEVELS["nf4"]).tolist()
    assert pairs == [[levels[byte >> 4], levels[byte & 15]] for byte in range(256)]


def test_a_weight_of_another_name_and_scales_in_another_shard(tmp_path: Path) -> None:
    tensors = packed((3, 64), "fp4", 64, True, "BF16")
    renamed = {name.replace("a.weight", "experts.gate_up_proj"): t for name, t in tensors.items()}
    first = {"experts.gate_up_proj": renamed.pop("experts.gate_up_proj"), "plain": torch.ones(3)}
    entries = held(tmp_path, first, renamed)
    (one,) = bnb4.find(entries, Quantization({}))
    assert one.name == "experts.gate_up_proj"
    assert one.code.describe == "bnb fp4 block 64, nested scales"
    assert torch.equal(whole(one.code), formula(tensors))


def test_a_plain_weight_under_a_config_that_promises_codes_is_left_alone(tmp_path: Path) -> None:
    entries = held(tmp_path, {"lm_head.weight": torch.ones(4, 4)})
    assert (
        list(bnb4.find(entries, Quantization({"quant_method": "bitsandbytes", "load_in_4bit": True}))) == []
    )


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 64]}
BAD: dict[str, tuple[Tensors, str]] = {
    "absmax packed for AVX512": (
        {"a.weight.absmax": torch.ones(1, 3, dtype=torch.bfloat16)},
        r"'a.weight.absmax' is BF16 \[1, 3\], not F32 \[3\]; bitsandbytes had packed it for a forward pass",
    ),
    "too few scales": ({"a.weight.absmax": torch.ones(2)}, r"is F32 \[2\], not F32 \[3\]$"),
    "codes cut short": (
        {"a.weight": random_bytes(95, 1)},
        r"'a.weight' is U8 \[95, 1\], not a column of the 192 codes of \[3, 64\]",
    ),
    "codes transposed": ({"a.weight": random_bytes(1, 96)}, r"is U8 \[1, 96\], not a column"),
    "another table": (
        {"a.weight.quant_map": torch.tensor(LEVELS["fp4"])},
        "'a.weight.quant_map' is not the table of nf4",
    ),
    "an odd block": (state_tensor("nf4", STATE | {"blocksize": 63}), "has blocksize 63, which bitsandbytes"),
    "another storage": ({"a.weight": random_bytes(96, 4).view(torch.int32)}, r"is I32 \[96, 1\]"),
    "a huge block": (state_tensor("nf4", STATE | {"blocksize": 2**60}), "has blocksize 1152921504606846976"),
    "a boolean size": (state_tensor("nf4", STATE | {"shape": [True, 64]}), r"has shape \[True, 64\]"),
    "another type": (state_tensor("nf4", STATE | {"quant_type": "fp4"}), "has quant_type 'fp4'"),
    "no JSON": ({"a.weight.quant_state.bitsandbytes__nf4": random_bytes(40)}, "is not JSON"),
    "a long state": (
        {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(2**20 + 1, dtype=torch.uint8)},
        "has 1048577 bytes where a few are expected",
    ),
    "nested without a table": ({"a.weight.nested_absmax": torch.ones(1)}, "no 'a.weight.nested_quant_map'"),
    "nested without an offset": (
        {"a.weight.nested_absmax": torch.ones(1), "a.weight.nested_quant_map": torch.ones(256)}
        | state_tensor("nf4", STATE | {"nested_dtype": "float32", "nested_blocksize": 256}),
        "nested_offset None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_weight_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, sentence = BAD[case]
    entries = held(tmp_path, packed((3, 64), "nf4", 64, False, "U8") | change)
    with pytest.raises(Refused, match=sentence) as refused:
        list(bnb4.find(entries, Quantization({})))
    assert len(refused.value.sentences) == 1
    assert "a.weight" in refused.value.sentences[0]


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map"])
def test_a_missing_part_is_refused_by_name(tmp_path: Path, part: str) -> None:
    tensors = packed((3, 64), "nf4", 64, False, "U8")
    del tensors["a.weight" + part]
    with pytest.raises(Refused, match=f"there is no 'a.weight{part}'"):
        list(bnb4.find(held(tmp_path, tensors), Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("nested", [False, True])
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, nested: bool) -> None:
    code = found(bnb4.find, tmp_path, packed((7, 93), "nf4", 64, nested, "U8")).code
    assert torch.equal(bits(whole(code, "cuda").cpu()), bits(whole(code)))
