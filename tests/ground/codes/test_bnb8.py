"""bitsandbytes LLM.int8 against bitsandbytes itself and against the formula in numpy, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.ground.codes import bnb8
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import found, gaussian, held, in_tiles, random_bytes, whole

SHAPES = [(64, 256), (5, 48), (1, 1), (7, 13), (300, 3)]


def codes(shape: tuple[int, int]) -> dict[str, Tensor]:
    """A module of random codes, every byte among them where there is room."""
    scales = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).exp()
    return {
        "a.SCB": scales,
        "a.weight": random_bytes(*shape).view(torch.int8),
        "a.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_random_codes_decode_by_the_formula_whole_and_in_any_tiles(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    tensors = codes(shape)
    one = found(bnb8.find, tmp_path, tensors, {"load_in_8bit": True})
    assert (one.name, one.code.shape, one.code.describe) == ("a.weight", shape, "bnb int8")
    exact = tensors["a.weight"].numpy().astype(np.float32) * tensors["a.SCB"].numpy()[:, None]
    expected = torch.from_numpy(exact * np.float32(7.874015718698502e-3))
    assert torch.equal(whole(one.code), expected)
    assert torch.equal(in_tiles(one.code, [1, 2, 3, 100]), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_decode_as_bitsandbytes_decodes_them(tmp_path: Path, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    quantized, scales, _ = functional.int8_vectorwise_quant(gaussian(*shape).half())
    for tensors in (codes(shape), codes(shape) | {"a.weight": quantized, "a.SCB": scales}):
        expected = functional.int8_vectorwise_dequant(tensors["a.weight"], tensors["a.SCB"])
        assert torch.equal(whole(found(bnb8.find, tmp_path, tensors).code), expected)


def test_neither_other_order_of_the_product_gives_these_bits(tmp_path: Path) -> None:
    tensors = codes((64, 256))
    values = whole(found(bnb8.find, tmp_path, tensors).code)
    weight, scales = tensors["a.weight"].float(), tensors["a.SCB"][:, None]
    assert not torch.equal(values, weight * (scales / 127))
    assert not torch.equal(values, weight * scales / 127)


def test_a_weight_without_a_format_is_of_rows(tmp_path: Path) -> None:
    tensors = codes((5, 48))
    expected = whole(found(bnb8.find, tmp_path, tensors).code)
    del tensors["a.weight_format"]
    assert torch.equal(whole(found(bnb8.find, tmp_path, tensors).code), expected)


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "tiles of a GPU": (
        {"a.weight_format": torch.tensor(3, dtype=torch.uint8)},
        r"'a.weight_format' is not 0 \(rows as they are\)",
    ),
    "scales of columns": ({"a.SCB": torch.ones(48)}, r"need F32 \[5\]"),
    "scales in 16 bits": ({"a.SCB": torch.ones(5).half()}, r"'a.SCB' is F16 \[5\]"),
    "no codes": ({"a.weight": torch.ones(5, 48)}, r"'a.weight' is F32 \[5, 48\], not I8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_weight_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence):
        list(bnb8.find(held(tmp_path, codes((5, 48)) | change), Quantization({})))


def test_scales_without_their_codes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"'a.weight' is no such tensor, not I8"):
        list(bnb8.find(held(tmp_path, {"a.SCB": torch.ones(5)}), Quantization({})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_the_same_bits(tmp_path: Path) -> None:
    code = found(bnb8.find, tmp_path, codes((7, 93))).code
    assert torch.equal(whole(code, "cuda").cpu(), whole(code))
