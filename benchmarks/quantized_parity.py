# ruff: noqa: T201
"""Decoders against references: the table format x reference x elements x differing bits.

`quantized_parity.py` decodes random codes of every value (with infinite, subnormal and NaN scales where the
format has them), quantized gaussians and ragged shapes, rounds to the dtype that the reference gives, and
counts the elements whose bits differ; all NaNs count as one. A reference is the package itself where it runs
here, else the format's formula in numpy or torch, in the dtype in which the package computes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import compressors
from compressed_tensors import quantization as schemes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.ground.codes import awq, bnb4, bnb8, compressed_tensors, fp8, gguf, gptq, hqq, mx, nvfp4
from tests.ground import test_gguf_codes
from tests.ground.codes import (
    test_awq,
    test_bnb4,
    test_bnb8,
    test_compressed_tensors,
    test_fp8,
    test_gptq,
    test_hqq,
    test_mx,
    test_nvfp4,
    test_torchao,
)
from tests.ground.codes.holding import bits, found, gaussian, random_bytes, whole
from tests.ground.codes.streams import planes

Case = tuple[str, str, Tensor, Tensor]  # format, reference, ours in float32, the reference's
SHAPES = [(512, 1024), (300, 704), (129, 2112), (7, 4160)]


def new(folder: Path) -> Path:
    """A folder in it."""
    return Path(tempfile.mkdtemp(dir=folder))


def bitsandbytes(folder: Path) -> Iterator[Case]:
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            name = f"bnb {kind}{', nested' if nested else ''}"
            for shape in (*SHAPES, (77, 1001), (33, 99)):
                tensors, _ = test_bnb4.quantized(gaussian(*shape).bfloat16(), kind, 64, nested, "U8")
                random = test_bnb4.packed(shape, kind, 64, nested, "BF16")
                for held in (tensors, random):
                    values = whole(found(bnb4.find, new(folder), held).code)
                    yield name, "bitsandbytes, default backend, bf16", values, test_bnb4.reference(held)
                    yield name, "formula, float32", values, test_bnb4.formula(held)
    for shape in (*SHAPES, (33, 99)):
        codes, scales, _ = functional.int8_vectorwise_quant(gaussian(*shape).half())
        for held in (test_bnb8.codes(shape), test_bnb8.codes(shape) | {"a.weight": codes, "a.SCB": scales}):
            expected = functional.int8_vectorwise_dequant(held["a.weight"], held["a.SCB"])
            yield (
                "bnb int8",
                "bitsandbytes, float32",
                whole(found(bnb8.find, new(folder), held).code),
                expected,
            )


def float8(folder: Path) -> Iterator[Case]:
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for shape in [*test_fp8.RAGGED, (1000, 1100), (1024, 1024), (384, 2048)]:
        grid = test_fp8.scales(-(-shape[0] // 128), -(-shape[1] // 128))
        for weight in (test_fp8.codes(*shape), (gaussian(*shape) * 8000).to(torch.float8_e4m3fn)):
            held = {"a.weight": weight, "a.weight_scale_inv": grid}
            values = whole(found(fp8.find, new(folder), held, test_fp8.BLOCK).code)
            for dtype in (torch.bfloat16, torch.float32):
                decoder = FP8BlockDequantizer(weight_block_size=(128, 128), dtype=dtype)
                expected = decoder._create_dequantized_weight(weight, grid)
                yield "FP8 block", "compressed-tensors", values, expected
            if not any(size % 128 for size in shape):
                expected = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.bfloat16)
                yield "FP8 block, whole blocks", "transformers", values, expected
    plain = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    for strategy, grid_shape in (("tensor", (1,)), ("channel", (700, 1))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            state = {
                "weight": test_fp8.codes(700, 1100),
                "weight_scale": test_fp8.scales(*grid_shape).to(dtype),
            }
            values = whole(found(fp8.find, new(folder), {f"a.{n}": t for n, t in state.items()}).code)
            expected = plain.decompress(state, scheme(8, "float", strategy))["weight"]
            yield f"FP8 {strategy}", "compressed-tensors", values, expected
    state = {"weight": test_fp8.codes(512, 2048), "weight_scale": random_bytes(512, 64)}
    values = whole(found(fp8.find, new(folder), {f"a.{n}": t for n, t in state.items()}).code)
    decoder = compressors.BaseCompressor.get_value_from_registry("mxfp8-quantized")
    args = scheme(8, "float", "group", group_size=32, scale_dtype=torch.uint8)
    yield "MXFP8", "compressed-tensors", values, decoder.decompress(state, args)["weight"]


def float4(folder: Path) -> Iterator[Case]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for shape in ((512, 1024), (301, 2064), (7, 4096)):
        held = dict(zip(test_nvfp4.CT, test_nvfp4.parts(*shape), strict=True))
        for number in (0.3, 1.0, 1234.567, 7e-5):
            held["a.weight_global_scale"] = torch.tensor([number])
            expected = test_nvfp4.decompressed({n.removeprefix("a."): t for n, t in held.items()})
            yield "NVFP4", "compressed-tensors", whole(found(nvfp4.find, new(folder), held).code), expected
        three = test_nvfp4.parts(*shape)
        values = whole(
            found(nvfp4.find, new(folder), dict(zip(test_nvfp4.MODELOPT, three, strict=True))).code
        )
        yield "NVFP4 modelopt", "formula, float32", values, test_nvfp4.formula(*three, False)
    decoder = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    for shape in ((512, 1024), (301, 2080)):
        packed, scale = random_bytes(shape[0], shape[1] // 2), random_bytes(shape[0], shape[1] // 32, seed=1)
        held = {"a.weight_packed": packed, "a.weight_scale": scale}
        state = {"weight_packed": packed, "weight_scale": scale}
        expected = decoder.decompress(state, scheme(4, "float", "group", group_size=32))["weight"]
        yield "MXFP4", "compressed-tensors", whole(found(mx.find, new(folder), held).code), expected
    for sizes in ((4, 512, 256), (3, 333, 96)):
        held = test_mx.gpt_oss(*sizes)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            expected = convert_moe_packed_tensors(held[test_mx.BLOCKS], held[test_mx.SCALES], dtype=dtype)
            yield "MXFP4 gpt-oss", "transformers", whole(found(mx.find, new(folder), held).code), expected


def scheme(num_bits: int, kind: str, strategy: str, **more: Any) -> Any:
    arguments = schemes.QuantizationArgs(num_bits=num_bits, type=kind, strategy=strategy, **more)
    return schemes.QuantizationScheme(targets=["Linear"], weights=arguments)


def integers(folder: Path) -> Iterator[Case]:
    ct = test_compressed_tensors
    for bits_, shape, strategy, size, symmetric in [
        *((b, (256, 1024), "group", 32, s) for b in range(1, 9) for s in (True, False)),
        *((b, (131, 929), "channel", None, s) for b in (3, 4, 5, 8) for s in (True, False)),
        *ct.PACKED,
    ]:
        for dtype in ct.DTYPES:
            layer = ct.Layer(bits_, shape, strategy, size, symmetric, dtype)
            held = layer.tensors(packed=True)
            values = whole(found(compressed_tensors.find, new(folder), held, layer.config(packed=True)).code)
            expected = ct.decompressed(layer, held, "pack-quantized")
            yield "pack-quantized, 1-8 bit", "compressed-tensors", values, expected
    plain: list[tuple[tuple[int, int], str, Any, bool]] = [*ct.PLAIN, ((500, 999), "channel", None, True)]
    for shape, strategy, block, symmetric in plain:
        layer = ct.Layer(8, shape, strategy, block, symmetric)
        held = layer.tensors(packed=False)
        values = whole(found(compressed_tensors.find, new(folder), held, layer.config(packed=False)).code)
        expected = ct.decompressed(layer, held, "int-quantized")
        yield "int-quantized", "compressed-tensors", values, expected


def calibrated(folder: Path) -> Iterator[Case]:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    for number in (2, 3, 4, 5, 6, 7, 8):
        for inputs, outputs, group in ((1024, 512, 128), (960, 352, 64), (160, 64, 32)):
            for shuffled in (False, True):
                layer = test_gptq.Layer(number, inputs, outputs, group, shuffled)
                forms = [(test_gptq.V2, layer.tensors())] if number in (2, 3, 4, 8) else []
                forms.append((test_gptq.V2 | {"checkpoint_format": "gptq_p"}, layer.tensors(packed=planes)))
                for config, held in forms:
                    values = whole(found(gptq.find, new(folder), held, config).code)
                    yield "GPTQ 2-8 bit", "formula, float16", values, layer.weight()
    for shape in ((1024, 512, 128), (960, 352, 64), *test_awq.SHAPES):
        layers = test_awq.Layer(*shape)
        held = layers.gemm()
        values = whole(found(awq.find, new(folder), held, test_awq.GEMM).code)
        yield "AWQ gemm", "formula, float16", values, layers.weight()
        codes, scales, zeros = AutoAWQConverter(group_size=shape[2])._convert_gemm_module(
            *(held[f"a.{part}"] for part in ("qweight", "scales", "qzeros"))
        )
        spread = zeros.repeat_interleave(shape[2], 1), scales.repeat_interleave(shape[2], 1)
        yield "AWQ gemm", "compressed-tensors", values, (codes - spread[0]).half() * spread[1]
        if shape[2] in (32, 64, 128) and shape[0] % 256 == 0:
            gemv = test_awq.GEMM | {"version": "gemv", "group_size": shape[2]}
            values = whole(found(awq.find, new(folder), layers.gemv(), gemv).code)
            yield "AWQ gemv", "formula, float16", values, layers.weight()


def others(folder: Path) -> Iterator[Case]:
    for number in test_hqq.PACKING:
        for axis in (0, 1):
            for shape, group in [*test_hqq.SHAPES, ((256, 512), 64)]:
                for dtype in test_hqq.DTYPES:
                    layer = test_hqq.Layer(number, shape, group, axis, dtype)
                    values = whole(found(hqq.find, new(folder), layer.tensors()).code)
                    yield "HQQ 1-8 bit", "formula, compute dtype", values, layer.weight()
    for kind in test_torchao.KINDS:
        for size, block in [*test_torchao.BLOCKS, *test_torchao.STACKS, ((512, 512), (1, 64))]:
            for dtype in test_torchao.DTYPES:
                zeros = None if kind == "Float8Tensor" else "int8"
                tensor = test_torchao.Layer(kind, size, block, dtype, zeros)
                values = whole(test_torchao.found(new(folder), tensor.tensors(), tensor.metadata()).code)
                yield f"torchao {kind}", "formula, its dtype", values, tensor.weight()
    for code in gguf.BLOCKS:
        raw = test_gguf_codes.random_rows(code, 64)
        yield (
            f"GGUF, {len(gguf.BLOCKS)} types",
            "gguf",
            gguf.decode(code, raw),
            test_gguf_codes.reference(code, raw),
        )


def main() -> None:
    torch.set_num_threads(1)
    table: dict[tuple[str, str], list[int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for cases in (bitsandbytes, float8, float4, integers, calibrated, others):
            for name, reference, values, expected in cases(folder):
                counts = table.setdefault((name, reference), [0, 0])
                counts[0] += expected.numel()
                counts[1] += int((bits(values.to(expected.dtype)) != bits(expected)).sum())
    print("| format | reference | elements | differing bits |")
    print("|---" * 4 + "|")
    for (name, reference), (elements, differing) in table.items():
        print(f"| {name} | {reference} | {elements:,} | {differing} |")


if __name__ == "__main__":
    main()
