"""compressed-tensors' integers against the formula, and against the package if it is there: bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ground.codes import compressed_tensors as ours
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import bits as bits_of
from tests.ground.codes.holding import found, gaussian, held, in_tiles, whole
from tests.ground.codes.streams import random_codes, random_scales, stream

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def config(weights: dict[str, Any], form: str = "pack-quantized", targets: str = "Linear") -> dict[str, Any]:
    """A quantization_config of one group."""
    group = {"targets": [targets], "weights": {"type": "int", **weights}, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


class Layer:
    """Random codes of a layer of any strategy, as the package names them."""

    def __init__(
        self, bits: int, shape: tuple[int, int], strategy: str, size: Any = None, symmetric: bool = True,
        dtype: str = "BF16",
    ) -> None:  # fmt: skip
        rows, columns = shape
        self.bits, self.shape, self.strategy, self.symmetric = bits, shape, strategy, symmetric
        height, width = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, size),
            "block": size,
        }[strategy]
        self.height, self.width = height, width
        grid = (-(-rows // height), -(-columns // width))
        self.codes = random_codes(*shape, bits=bits) - 2 ** (bits - 1)
        self.zeros = (
            torch.zeros(grid) if symmetric else random_codes(*grid, bits=bits, seed=3) - 2 ** (bits - 1)
        )
        self.scales = random_scales(*grid).to(DTYPES[dtype])
        self.arguments: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy}
        if strategy in {"group", "block"}:
            self.arguments["group_size" if strategy == "group" else "block_structure"] = (
                size if strategy == "group" else list(size)
            )

    def weight(self) -> Tensor:
        """Multiplied in the scales' dtype, as the reference does; the blocks cut."""
        zeros, scales = (
            grid.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)[
                : self.shape[0], : self.shape[1]
            ]
            for grid in (self.zeros, self.scales)
        )
        return (self.codes - zeros).to(scales.dtype) * scales

    def tensors(self, packed: bool) -> dict[str, Tensor]:
        """As the file has them."""
        low = 2 ** (self.bits - 1)
        scales = self.scales.flatten() if self.strategy == "tensor" else self.scales
        tensors = {"a.weight_scale": scales}
        if packed:
            tensors |= {"a.weight_packed": stream(self.codes + low, self.bits)}
            tensors |= {"a.weight_shape": torch.tensor(self.shape)}
        else:
            tensors |= {"a.weight": self.codes.to(torch.int8)}
        if not self.symmetric:
            zeros = self.zeros.to(torch.int8).view(scales.shape)
            if packed and self.strategy != "tensor":
                zeros = stream((self.zeros + low).t().contiguous(), self.bits).t()
            tensors["a.weight_zero_point"] = zeros
        return tensors

    def config(self, packed: bool) -> dict[str, Any]:
        return config(self.arguments, "pack-quantized" if packed else "int-quantized")


def decompressed(layer: Layer, tensors: dict[str, Tensor], form: str) -> Tensor:
    """By the package itself; skips without it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    arguments = schemes.QuantizationArgs(type="int", **layer.arguments)
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {name.removeprefix("a."): tensor.contiguous() for name, tensor in tensors.items()}
    decompress = compressors.BaseCompressor.get_value_from_registry(form).decompress
    weight = decompress(state, scheme)["weight"]
    assert isinstance(weight, Tensor)
    return weight


PACKED = [
    *((bits, (40, 160), "group", 32, symmetric) for bits in range(1, 9) for symmetric in (True, False)),
    *((bits, (7, 93), "channel", None, symmetric) for bits in (3, 4, 5, 8) for symmetric in (True, False)),
    *((bits, (5, 33), "tensor", None, symmetric) for bits in (3, 4, 8) for symmetric in (True, False)),
    (4, (1, 1), "tensor", None, True),
    (7, (3, 1), "channel", None, True),
    (4, (64, 256), "group", 128, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "shape", "strategy", "size", "symmetric"), PACKED)
def test_packed_codes_decode_whole_and_in_tiles(
    tmp_path: Path, bits: int, shape: tuple[int, int], strategy: str, size: Any, symmetric: bool, dtype: str
) -> None:
    layer = Layer(bits, shape, strategy, size, symmetric, dtype)
    tensors = layer.tensors(packed=True)
    one = found(ours.find, tmp_path, tensors, layer.config(packed=True))
    assert (one.name, one.code.shape, one.main.name) == ("a.weight", shape, "a.weight_packed")
    values = whole(one.code)
    assert torch.equal(bits_of(values.to(DTYPES[dtype])), bits_of(layer.weight()))
    assert torch.equal(bits_of(in_tiles(one.code, [1, 3, 8, 30])), bits_of(values))
    assert pickle.loads(pickle.dumps(one.code)) == one.code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "shape", "strategy", "size", "symmetric"), PACKED)
def test_packed_codes_decode_as_compressed_tensors_decodes_them(
    tmp_path: Path, bits: int, shape: tuple[int, int], strategy: str, size: Any, symmetric: bool, dtype: str
) -> None:
    layer = Layer(bits, shape, strategy, size, symmetric, dtype)
    tensors = layer.tensors(packed=True)
    expected = decompressed(layer, tensors, "pack-quantized")
    values = whole(found(ours.find, tmp_path, tensors, layer.config(packed=True)).code)
    assert torch.equal(bits_of(values.to(expected.dtype)), bits_of(expected))


PLAIN = [
    *(((40, 96), strategy, size, symmetric)
      for strategy, size in [("tensor", None), ("channel", None), ("group", 32), ("block", (16, 32))]
      for symmetric in (True, False)),
    ((43, 101), "block", (16, 32), False),
    ((5, 7), "block", (128, 128), True),
    ((16, 130), "block", (1, 128), True),
    ((130, 16), "block", (128, 16), True),
]  # fmt: skip


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize(("shape", "strategy", "size", "symmetric"), PLAIN)
def test_plain_codes_decode_by_the_formula_and_as_compressed_tensors_decodes_them(
    tmp_path: Path, shape: tuple[int, int], strategy: str, size: Any, symmetric: bool, form: str
) -> None:
    layer = Layer(8, shape, strategy, size, symmetric)
    tensors = layer.tensors(packed=False)
    one = found(ours.find, tmp_path, tensors, config(layer.arguments, form))
    assert one.name == one.main.name == "a.weight"
    assert torch.equal(bits_of(whole(one.code).bfloat16()), bits_of(layer.weight()))
    assert torch.equal(bits_of(in_tiles(one.code, [1, 15, 17, 33])), bits_of(whole(one.code)))
    expected = decompressed(layer, tensors, form)
    assert torch.equal(bits_of(whole(one.code).bfloat16()), bits_of(expected))


def test_what_compressed_tensors_compresses_comes_back_as_it_decompresses_it(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    form = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    weight = gaussian(48, 256).bfloat16()
    groups = weight.float().unflatten(1, (-1, 64))
    for bits in range(2, 9):
        arguments = schemes.QuantizationArgs(num_bits=bits, strategy="group", group_size=64, symmetric=False)
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)
        scales = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
        zeros = (-groups.amin(2) / scales).round().sub(2 ** (bits - 1)).to(torch.int8)
        state = {"weight": weight, "weight_scale": scales.bfloat16(), "weight_zero_point": zeros}
        packed = form.compress(state, scheme)
        tensors = {f"a.{name}": tensor for name, tensor in packed.items()}
        code = found(ours.find, tmp_path, tensors, config(arguments.model_dump(mode="json"))).code
        values = whole(code)
        assert torch.equal(values.bfloat16(), form.decompress(packed, scheme)["weight"])
        assert (values - weight.float()).norm() < 2.0 ** (1 - bits) * weight.float().norm()


def test_a_stack_of_experts_decodes_as_each_of_them(tmp_path: Path) -> None:
    layers = [Layer(3, (33, 96), "group", 32, False) for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.codes = random_codes(33, 96, bits=3, seed=10 + number) - 4
        layer.zeros = random_codes(33, 3, bits=3, seed=20 + number) - 4
    each = [layer.tensors(packed=True) for layer in layers]
    tensors = {name: torch.stack([t[name] for t in each]) for name in each[0] if not name.endswith("shape")}
    tensors["a.weight_shape"] = torch.tensor([3, 33, 96])
    code = found(ours.find, tmp_path, tensors, layers[0].config(packed=True)).code
    assert code.shape == (3, 33, 96)
    assert torch.equal(whole(code).bfloat16(), torch.stack([layer.weight() for layer in layers]))
    assert torch.equal(in_tiles(code, [1, 30, 40, 70]), whole(code))


def test_groups_of_the_config_may_differ_and_the_narrowest_target_counts(tmp_path: Path) -> None:
    four, eight = Layer(4, (8, 64), "group", 32), Layer(8, (8, 64), "channel")
    plain, blocks = Layer(8, (20, 40), "channel"), Layer(8, (20, 40), "block", (16, 16))
    tensors: dict[str, Tensor] = {}
    for name, layer in (("m.four", four), ("m.eight", eight), ("m.plain", plain), ("m.blocks", blocks)):
        packed = name in {"m.four", "m.eight"}
        tensors |= {n.replace("a.", f"{name}."): t for n, t in layer.tensors(packed).items()}
    tensors |= {"lm_head.weight": torch.ones(4, 4), "m.four.input_scale": torch.ones(1)}
    groups = {
        "all": {"targets": ["Linear"], "weights": four.arguments},
        "eight": {"targets": ["re:.*eight$"], "weights": eight.arguments},
        "plain": {"targets": ["m.plain"], "weights": plain.arguments},
        "blocks": {"targets": ["re:m[.]bl.*", "m.nothing"], "weights": blocks.arguments},
    }
    settled = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    codes = {f.name: f.code for f in ours.find(held(tmp_path, tensors), Quantization(settled))}
    expected = {"m.four": four, "m.eight": eight, "m.plain": plain, "m.blocks": blocks}
    assert set(codes) == {f"{name}.weight" for name in expected}
    for name, layer in expected.items():
        assert torch.equal(whole(codes[f"{name}.weight"]).bfloat16(), layer.weight())


def test_packed_codes_are_known_without_a_config(tmp_path: Path) -> None:
    layer = Layer(4, (8, 64), "group", 32, False)
    tensors = layer.tensors(packed=True)
    entries = held(tmp_path, {"a.weight_scale": tensors.pop("a.weight_scale")}, tensors)  # two shards
    (one,) = ours.find(entries, Quantization({}))
    assert torch.equal(whole(one.code).bfloat16(), layer.weight())
    plain = held(tmp_path, Layer(8, (8, 64), "channel").tensors(packed=False))
    assert list(ours.find(plain, Quantization({"quant_method": "quark"}))) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 40), groups=st.integers(1, 4))
def test_any_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, bits: int, rows: int, groups: int
) -> None:
    layer = Layer(bits, (rows, groups * 24), "group", 24, data.draw(st.booleans()))
    tensors = layer.tensors(packed=True)
    code = found(ours.find, tmp_path_factory.mktemp("ct"), tensors, layer.config(packed=True)).code
    cuts = data.draw(st.lists(st.integers(0, rows)))
    assert torch.equal(in_tiles(code, cuts).bfloat16(), layer.weight())


GOOD = Layer(4, (8, 64), "group", 32, False)


def changed(**parts: Tensor | None) -> dict[str, Tensor]:
    """A good packed layer with some tensors changed or, if None, taken away."""
    tensors = {**GOOD.tensors(packed=True), **{f"a.{part}": tensor for part, tensor in parts.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


ROTATED = {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "act-order": (
        changed(weight_g_idx=torch.zeros(64, dtype=torch.int32)),
        {},
        r"'a.weight_packed' is act-ordered \(weight_g_idx\)",
    ),
    "wrong bits": (
        changed(),
        config(GOOD.arguments | {"num_bits": 3}),
        r"'a.weight_packed' does not fit together as \[8, 64\] codes of num_bits 3, .* \[8, 8\]",
    ),
    "wrong group": (changed(), config(GOOD.arguments | {"group_size": 64}), "num_bits 4, .* group_size 64"),
    "no zero points": (
        changed(weight_zero_point=None),
        config(GOOD.arguments),
        "codes of .* symmetric False: weight_shape",
    ),
    "wrong zeros": (changed(weight_zero_point=torch.zeros(2, 2).int()), {}, r"zero_point I32 \[2, 2\]"),
    "wrong shape": (changed(weight_shape=torch.tensor([9, 64])), {}, r"fit together as \[9, 64\] codes"),
    "negative shape": (changed(weight_shape=torch.tensor([8, -64])), {}, r"fit together as \[8, -64\]"),
    "no shape": (changed(weight_shape=None), {}, "'a.weight_packed' has no weight_shape"),
    "no scale": (changed(weight_scale=None), {}, "'a.weight_packed' has no weight_scale that fits"),
    "scales in bytes": (changed(weight_scale=torch.ones(8, 2).byte()), {}, "has no weight_scale .* U8"),
    "wrong grid": (changed(weight_scale=torch.ones(8, 3)), {}, r"fit together .* weight_scale F32 \[8, 3\]"),
    "global scale": (changed(weight_global_scale=torch.ones(1)), {}, "stands beside 'weight_global_scale'"),
    "rotated": (changed(), config(GOOD.arguments) | ROTATED, "transform_config: its weights are rotated"),
    "blocks": (
        Layer(8, (20, 40), "block", (16, 16)).tensors(packed=False),
        config({"num_bits": 8, "strategy": "block", "block_structure": [8, 8]}),
        r"'a.weight' does not fit together as \[20, 40\] codes of .* block_structure \[8, 8\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, settled, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(ours.find(held(tmp_path, tensors), Quantization(settled)))


def test_codes_of_other_formats_are_left_alone(tmp_path: Path) -> None:
    marlin = {
        "a.weight_packed": torch.zeros(2, 2).int(),
        "a.scale_packed": torch.ones(2),
        "a.meta": torch.ones(2),
    }
    nvfp4 = {"b.weight_packed": torch.zeros(4, 8).byte(), "b.weight_scale": torch.ones(4, 1)}
    entries = held(tmp_path, marlin | nvfp4 | {"c.weight": torch.ones(4, 4).bfloat16()})
    assert list(ours.find(entries, Quantization({"quant_method": "compressed-tensors"}))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_gpu_decodes_the_same_bits(tmp_path: Path, bits: int) -> None:
    layer = Layer(bits, (40, 160), "group", 32, False)
    code = found(ours.find, tmp_path, layer.tensors(packed=True), layer.config(packed=True)).code
    assert torch.equal(whole(code, "cuda").cpu(), whole(code))
