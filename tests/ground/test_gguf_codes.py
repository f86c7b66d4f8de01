"""GGUF decoders: every type, every pattern of bits, equal to gguf-py's decoder bit for bit."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from pipeline.ground.codes.gguf import BLOCKS, decode, row_bytes
from pipeline.ground.errors import Refused

NUM_ROWS = 24


def reference(code: str, raw: Tensor) -> Tensor:
    """As gguf-py decodes; F64, which it leaves out, as numpy rounds."""
    with numpy.errstate(all="ignore"):
        if code == "F64":
            return torch.from_numpy(raw.numpy().view(numpy.float64).astype(numpy.float32))
        return torch.from_numpy(quants.dequantize(raw.numpy(), GGMLQuantizationType[code]).copy())


def bits(values: Tensor) -> Tensor:
    """The bits of float32 values, all NaNs being one: which of them comes out is the processor's choice."""
    assert values.dtype == torch.float32
    return torch.where(values.isnan(), 0x7FC00000, values.view(torch.int32))


def random_rows(code: str, num_rows: int = NUM_ROWS) -> Tensor:
    """Random bytes: every code and sign, and among the scales NaN, infinity, zero and subnormal numbers."""
    elements, size = BLOCKS[code]
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, max(1, 2048 // elements) * size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_what_gguf_py_decodes_we_decode() -> None:
    decodable = {"F64"}
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(numpy.zeros((1, size), numpy.uint8), kind)
            decodable.add(kind.name)
        except NotImplementedError:
            pass
    assert set(BLOCKS) == decodable
    for code, block in BLOCKS.items():
        assert block == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[code]]


@pytest.mark.parametrize("code", BLOCKS)
def test_random_bytes_decode_as_gguf_py_decodes_them(code: str) -> None:
    raw = random_rows(code)
    values = decode(code, raw)
    assert values.shape == (NUM_ROWS, raw.shape[1] // BLOCKS[code][1] * BLOCKS[code][0])
    assert torch.equal(bits(values), bits(reference(code, raw)))


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_one_byte_repeated_decodes_as_gguf_py_decodes_it(code: str) -> None:
    raw = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, BLOCKS[code][1]).contiguous()
    assert torch.equal(bits(decode(code, raw)), bits(reference(code, raw)))


QUANTIZABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("code", QUANTIZABLE)
def test_quantized_gaussians_decode_as_gguf_py_decodes_them(code: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = 0.02 * torch.randn(NUM_ROWS, 1024, generator=generator)
    packed = quants.quantize(weights.numpy(), GGMLQuantizationType[code])
    raw = torch.from_numpy(packed).view(torch.uint8)
    values = decode(code, raw)
    assert torch.equal(values.view(torch.int32), reference(code, raw).view(torch.int32))
    assert (values - weights).norm() < weights.norm()  # neither shuffled nor zero


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_every_half_decodes_as_gguf_py_decodes_it(code: str) -> None:
    raw = torch.arange(-(2**15), 2**15).short().view(256, 256).view(torch.uint8)
    assert torch.equal(bits(decode(code, raw)), bits(reference(code, raw)))


@pytest.mark.parametrize("code", BLOCKS)
def test_tiles_of_rows_equal_the_whole(code: str) -> None:
    raw = random_rows(code)
    whole = decode(code, raw)
    for start, stop in [(0, 1), (1, 2), (3, 10), (10, NUM_ROWS), (5, 5)]:
        assert torch.equal(bits(decode(code, raw[start:stop])), bits(whole[start:stop]))


@pytest.mark.parametrize("code", BLOCKS)
def test_a_single_block_at_any_byte_decodes(code: str) -> None:
    elements, size = BLOCKS[code]
    raw = random_rows(code, 1)[:, :size]
    whole = decode(code, raw.clone())
    assert whole.shape == (1, elements)
    for offset in range(9):
        buffer = torch.cat([torch.zeros(offset, dtype=torch.uint8), raw.flatten()])
        assert torch.equal(bits(decode(code, buffer[offset:].view(1, -1))), bits(whole))


@pytest.mark.parametrize("code", BLOCKS)
def test_decoded_values_have_memory_of_their_own(code: str) -> None:
    raw = random_rows(code, 2)
    before = raw.clone()
    decode(code, raw).fill_(1.0)
    assert torch.equal(raw, before)


def test_bytes_of_a_row_are_those_of_gguf_py() -> None:
    for code in BLOCKS:
        if code != "F64":
            columns = 3 * BLOCKS[code][0]
            shape = quants.quant_shape_to_byte_shape((5, columns), GGMLQuantizationType[code])
            assert row_bytes(code, columns) == shape[1]


def test_a_broken_block_and_a_type_without_decoder_are_refused() -> None:
    with pytest.raises(Refused, match="a row of 100 elements does not fill Q4_1 blocks of 32"):
        row_bytes("Q4_1", 100)
    with pytest.raises(Refused, match="GGUF type I32 cannot be decoded; F32, F16, Q4_0"):
        row_bytes("I32", 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("code", BLOCKS)
def test_a_gpu_decodes_the_same_bits(code: str) -> None:
    raw = random_rows(code)
    values = decode(code, raw.cuda())
    assert values.is_cuda
    assert torch.equal(bits(values.cpu()), bits(decode(code, raw)))
