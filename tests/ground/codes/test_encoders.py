"""What we encode, byte for byte beside bitsandbytes, transformers and compressed-tensors.

References run on one thread: bitsandbytes takes the mean of all scales, and torch's sum of many numbers has
other last bits on several.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.ground.codes.encoders.bnb4 import Bnb4Encoder, nested_levels, unnested
from pipeline.ground.codes.encoders.bnb8 import Bnb8Encoder
from pipeline.ground.codes.encoders.integers import PackedEncoder, packed
from pipeline.ground.codes.encoders.mx import nearest
from pipeline.ground.codes.encoders.schemes import SCHEMES
from pipeline.ground.codes.small_floats import E2M1
from tests.ground.codes.encoding import assert_same_bytes, encoded, raw, weight
from tests.ground.codes.holding import gaussian

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (48, 80), (130, 300), (5, 4304), (65, 1), (192, 576)]
BLOCKSIZES = (32, 64, 128, 4096)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed, shape in enumerate(SHAPES * 2):
        size, values = BLOCKSIZES[seed % 4], weight(shape, seed)
        codes, state = functional.quantize_4bit(
            values, blocksize=size, quant_type=kind, compress_statistics=nested
        )
        wanted = {"a.weight": codes, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        encoder = Bnb4Encoder("a.weight", shape, kind, size, nested, "float32")
        assert [part.name for part in encoder.parts if part.late] == [*wanted][-1:] * nested
        for grains in (1, 3, 1000):
            assert_same_bytes(encoded(encoder, values, grains)[0], wanted)


def test_nested_levels_and_what_they_mean_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nested_levels("cpu"), functional.create_dynamic_map())
    values = gaussian(96, 640)
    _, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(unnested(state.absmax, state.state2.absmax, state.offset.item()), absmax)


def test_int8_is_that_of_bitsandbytes() -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    for seed, shape in enumerate(SHAPES * 2):
        values = weight(shape, seed)
        theirs = modules.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
        wanted = {"a.weight": theirs.data, "a.SCB": theirs.SCB}
        wanted["a.weight_format"] = torch.zeros((), dtype=torch.uint8)
        for grains in (1, 50):
            assert_same_bytes(encoded(Bnb8Encoder("a.weight", shape), values, grains)[0], wanted)


def transformers_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of whole blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"a.weight": values})
    return made["a.weight"], made["a.weight_scale_inv"]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (5, 7), (130, 300), (192, 256), (576, 70)])
def test_fp8_blocks_are_those_of_transformers_the_last_ones_cut(shape: tuple[int, int]) -> None:
    """Padded with zeros to whole blocks, which transformers itself leaves unquantized."""
    rows, columns = shape
    for seed in range(6):
        values = weight(shape, seed)
        codes, scale = transformers_fp8(torch.nn.functional.pad(values, (0, -columns % 128, 0, -rows % 128)))
        wanted = {"a.weight": codes[:rows, :columns], "a.weight_scale_inv": scale}
        encoder = SCHEMES["fp8-block"].encoder("a.weight", shape, "BF16")
        assert encoder
        for grains in (1, 2):
            assert_same_bytes(encoded(encoder, values, grains)[0], wanted)


def test_fp8_blocks_of_ones_and_powers() -> None:
    """By hand: a block with 448 in it keeps whole numbers of four bits as they are, and the scale is one."""
    values = torch.zeros(128, 128)
    values[0, :4] = torch.tensor([448.0, -13.0, 0.0625, 2.0**-9])
    encoder = SCHEMES["fp8-block"].encoder("a.weight", (128, 128), "BF16")
    assert encoder
    made, decoded = encoded(encoder, values)
    assert made["a.weight_scale_inv"].tolist() == [[1.0]]
    assert decoded[0, :4].tolist() == values[0, :4].tolist()


@pytest.mark.parametrize("name", ["fp8-channel", "int4-g128"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_compressed_tensors_are_those_of_compressed_tensors(name: str, dtype: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    scheme = SCHEMES[name]
    config = scheme.config(dtype, ["lm_head"], ["a.weight"])
    arguments = quantization.QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    whole_scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    for seed, shape in enumerate([(1, 128), (130, 256), (64, 384)] * 3):
        values = weight(shape, seed)
        groups = values.view(shape[0], -1, 128) if name == "int4-g128" else values[:, None]
        scale, _ = utils.calculate_qparams(groups.amin(2), groups.amax(2), arguments)
        wanted = compressor.compress({"weight": values, "weight_scale": scale.to(kind)}, whole_scheme)
        encoder = scheme.encoder("weight", shape, dtype)
        assert encoder
        made, decoded = encoded(encoder, values, 5)
        assert_same_bytes(made, wanted)
        assert torch.equal(decoded.to(kind), compressor.decompress(wanted, whole_scheme)["weight"])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_are_a_stream_of_bits(bits: int) -> None:
    """Against Python's whole numbers: code i stands at bit i * bits."""
    for columns in (1, 7, 8, 31, 32, 33, 300):
        codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(columns))
        words = packed(codes.to(torch.uint8), bits)
        assert words.shape == (3, -(-columns * bits // 32))
        for row, found_words in zip(codes.tolist(), words, strict=True):
            number = sum(code << i * bits for i, code in enumerate(row))
            assert raw(found_words) == number.to_bytes(words.shape[1] * 4, "little")


def test_fp4_takes_the_nearest_level_and_half_to_even() -> None:
    levels = torch.tensor(E2M1)
    values = torch.linspace(-9, 9, 14_401)
    distance = (values[:, None] - levels).abs()
    codes = nearest(values)
    assert torch.equal(distance.gather(1, codes[:, None].long())[:, 0], distance.amin(1))
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert levels[nearest(halves).long()].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


def test_fp8_by_chance_is_unbiased_on_its_grid() -> None:
    """The mean of n draws is off by less than 5 / sqrt(12 n) steps of its grid for all but 1 in 10^6."""
    values = gaussian(128, 256)
    encoder = SCHEMES["fp8-block"].encoder("a.weight", (128, 256), "BF16")
    assert encoder
    count, mean = 64, torch.zeros(128, 256, dtype=torch.float64)
    for stream in range(count):
        mean += encoded(encoder, values, 1, stream)[1].double() / count
    with encoder.open("cpu") as encode:
        made = encode(values, 0, None)
        step = encoder.step(values.double(), made, 0)
    off = (mean - values) / step
    assert float(off.abs().mean()) < 0.5 / count**0.5  # of one draw: at most half a step's deviation
    assert abs(float(off.mean())) < 5 * 0.5 / (count * values.numel()) ** 0.5
    once = encoded(encoder, values, 1, 7)
    assert_same_bytes(once[0], encoded(encoder, values, 1000, 7)[0])


def test_packed_encoder_decodes_as_it_says() -> None:
    values = gaussian(9, 256)
    encoder = PackedEncoder("a.weight", (9, 256), 4, 128, "BF16")
    _, decoded = encoded(encoder, values, 2)
    scale = (values.view(9, 2, 128).abs().amax(2) / 7.5).bfloat16().float()[:, :, None]
    wanted = (values.view(9, 2, 128) / scale).round().clamp(-8, 7) * scale
    assert torch.equal(decoded, wanted.view(9, 256))
