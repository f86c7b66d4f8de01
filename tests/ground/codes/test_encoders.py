"""What we encode, byte for byte beside bitsandbytes, transformers and compressed-tensors.

References run on one thread: bitsandbytes takes the mean of all scales, and torch's sum of many numbers has
other last bits on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.ground.codes import bnb4, bnb8, compressed_tensors, fp8, mx
from pipeline.ground.codes.code import Finder
from pipeline.ground.codes.encoders.bnb4 import Bnb4Encoder, nested_levels, unnested
from pipeline.ground.codes.encoders.bnb8 import Bnb8Encoder
from pipeline.ground.codes.encoders.encoder import Encoder
from pipeline.ground.codes.encoders.integers import PackedEncoder, packed
from pipeline.ground.codes.encoders.mx import nearest
from pipeline.ground.codes.encoders.same import same_format
from pipeline.ground.codes.encoders.schemes import SCHEMES
from pipeline.ground.codes.small_floats import E2M1
from tests.ground.codes.holding import found, gaussian, random_bytes, whole
from tests.quantizing import Written, formats

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (48, 80), (130, 300), (5, 4304), (65, 1), (192, 576)]
BLOCKSIZES = (32, 64, 128, 4096)
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weight(shape: tuple[int, int], seed: int) -> Tensor:
    """Values as models have them and as they have not: a row of zeros, one of them negative, tiny, large."""
    values = gaussian(*shape, seed=seed) * (1, 1e-36, 300)[seed % 3]
    if seed % 2:
        values[0] = 0.0
        values[0, -1] = -0.0
    return values


def encoded(
    encoder: Encoder, values: Tensor, grains: int = 1, stream: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors, what they were said to mean), from tiles of so many grains, the last one first."""
    rows = values.reshape(-1, values.shape[-1])
    step = encoder.grain * grains
    starts = list(range(0, len(rows), step))
    with encoder.open("cpu") as encode:
        made = {start: encode(rows[start : start + step], start, stream) for start in reversed(starts)}
    codes = torch.zeros(encoder.parts[0].num_bytes, dtype=torch.uint8)
    for start in starts:
        bytes_ = made[start].codes.contiguous().view(-1).view(torch.uint8)
        codes[encoder.offset(start) :][: len(bytes_)] = bytes_
    others = encoder.finish([made[start].sides if encoder.gathers else () for start in starts])
    for part in encoder.parts[1:]:
        size = others[part.name].numel() * others[part.name].element_size()
        assert size == part.num_bytes or (part.late and size <= part.num_bytes)
    decoded = torch.cat([encoder.decoded(made[start], start) for start in starts])
    return {encoder.parts[0].name: codes, **others}, decoded.view(values.shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same_bytes(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert made.keys() == wanted.keys()
    assert [name for name in made if raw(made[name]) != raw(wanted[name])] == []


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


KEPT = ["FP8 block", "FP8 channel", "FP8 tensor", "MXFP8", "MXFP4", "int4 packed", "int8 channel"]
KEPT += ["int4 packed, zero points"]
FINDERS: dict[str, Finder] = {"FP8": fp8.find, "MXFP8": fp8.find, "MXFP4": mx.find}


def finder_of(name: str) -> Finder:
    return FINDERS.get(name.split()[0], compressed_tensors.find)


def folder(parent: Path) -> Path:
    """A new one, for files are held to what they were when they were read."""
    made = parent / str(len(list(parent.iterdir())))
    made.mkdir()
    return made


def as_read(name: str, written: Written, parent: Path) -> Encoder:
    """The encoder of the format in which a weight stands in a file."""
    tensors = {f"a.{last}": tensor for last, tensor in written.tensors.items()}
    one = found(finder_of(name), folder(parent), tensors, formats()[name].config)
    encoder = same_format(one.name, one.code)
    assert encoder
    return encoder


@pytest.mark.parametrize("name", KEPT)
def test_what_no_delta_moves_keeps_its_very_codes(name: str, tmp_path: Path) -> None:
    for seed, shape in enumerate([(130, 192), (64, 320)]):
        written = formats()[name].write(gaussian(*shape, seed=seed))
        encoder = as_read(name, written, tmp_path)
        made, decoded = encoded(encoder, written.weight.float(), 3)
        assert_same_bytes(made, {f"a.{last}": tensor for last, tensor in written.tensors.items()})
        assert torch.equal(decoded, written.weight)


@pytest.mark.parametrize("name", KEPT)
def test_codes_over_the_bases_scales_are_the_nearest_ones(name: str, tmp_path: Path) -> None:
    """No other codes over the same scales are nearer; and the decoder reads what the encoder says."""
    written = formats()[name].write(gaussian(130, 192, seed=1))
    values = 0.9 * written.weight.float() + gaussian(130, 192, seed=2) / 50
    encoder = as_read(name, written, tmp_path)
    made, decoded = encoded(encoder, values, 2)
    main = encoder.parts[0].name
    wanted = {f"a.{last}": tensor for last, tensor in written.tensors.items()}
    assert [key for key in made if key != main and raw(made[key]) != raw(wanted[key])] == []

    def meant(codes: Tensor) -> Tensor:
        shaped = codes.view(wanted[main].dtype).view(wanted[main].shape)
        one = found(finder_of(name), folder(tmp_path), {**wanted, main: shaped}, formats()[name].config)
        return whole(one.code)

    assert torch.equal(meant(made[main]), decoded)
    for seed in range(4):
        others = meant(random_bytes(*made[main].shape, seed=seed))
        assert bool(((others - values).abs().nan_to_num(nan=torch.inf) >= (decoded - values).abs()).all())


def test_a_kept_scale_grows_where_a_value_lies_beyond_the_largest_code(tmp_path: Path) -> None:
    for name in ("FP8 block", "FP8 channel", "MXFP8", "MXFP4"):
        written = formats()[name].write(gaussian(130, 192))
        encoder = as_read(name, written, tmp_path)
        values = written.weight.float()
        values[3, 5] = 10 * values.abs().max()
        made, decoded = encoded(encoder, values)
        assert float((decoded[3, 5] / values[3, 5] - 1).abs()) <= 2.0**-3  # half a step of three, at most
        (before,) = (tensor for key, tensor in written.tensors.items() if "scale" in key)
        (after,) = (tensor for key, tensor in made.items() if "scale" in key)
        assert int((before.float() != after.float().view(before.shape)).sum()) == 1  # that block's alone


def test_gpt_oss_experts_keep_their_codes(tmp_path: Path) -> None:
    scales = torch.randint(110, 125, (3, 48, 2), dtype=torch.uint8)
    tensors = {"a.x_blocks": random_bytes(3, 48, 2, 16), "a.x_scales": scales}
    code = found(mx.find, folder(tmp_path), tensors).code
    encoder = same_format("a.x", code)
    assert encoder
    made, decoded = encoded(encoder, whole(code))
    assert torch.equal(decoded, whole(code))
    again = {"a.x_blocks": made["a.x_blocks"].view(3, 48, 2, 16), "a.x_scales": made["a.x_scales"]}
    assert torch.equal(whole(found(mx.find, folder(tmp_path), again).code), whole(code))
    levels = torch.tensor(E2M1)  # minus zero is another code with the same value
    assert torch.equal(levels[(again["a.x_blocks"] & 15).long()], levels[(tensors["a.x_blocks"] & 15).long()])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_own_format_is_written_again_as_it_stood(tmp_path: Path, storage: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for nested in (False, True):
        codes, state = functional.quantize_4bit(
            gaussian(48, 80).bfloat16(), quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        tensors = {"a.weight": codes, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        one = found(bnb4.find, folder(tmp_path), tensors)
        encoder = same_format(one.name, one.code)
        assert encoder
        values = whole(one.code) + gaussian(48, 80, seed=3) / 10
        wanted_codes, wanted_state = functional.quantize_4bit(
            values, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        wanted_state.dtype = torch.bfloat16  # what the base computes in
        packed_state = {f"a.weight.{k}": v for k, v in wanted_state.as_dict(packed=True).items()}
        assert_same_bytes(encoded(encoder, values, 2)[0], {"a.weight": wanted_codes, **packed_state})


def test_int8_without_a_format_stays_so(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 4, dtype=torch.int8), "a.SCB": torch.ones(3)}
    one = found(bnb8.find, tmp_path, tensors)
    encoder = same_format(one.name, one.code)
    assert encoder and [part.name for part in encoder.parts] == ["a.weight", "a.SCB"]


def test_fp8_by_chance_is_unbiased_on_its_grid(tmp_path: Path) -> None:
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
