"""Whole checkpoints of codes, rounded to nearest by us, and the weights that their formulas mean.

What every format is and where it is described stands in `pipeline/ground/codes/`; here the same is written
anew, the other way round, so that a merge can be held against weights that no decoder of ours has touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.ground.codes.streams import interleaved, quantized, stream
from tests.models import tensors

E4M3 = torch.float8_e4m3fn
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of E2M1, and after them their negatives
Tensors = dict[str, Tensor]
BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Written:
    """A weight in a file: tensors by the ends of their names, what they mean in float32, and metadata."""

    tensors: Tensors
    weight: Tensor
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How weights `(out, in)` are written, and what the config says of it."""

    write: Callable[[Tensor], Written]
    config: Mapping[str, Any]


def fp8_block(weight: Tensor) -> Written:
    """Blocks of 128 x 128, the last ones cut."""
    rows, columns = weight.shape
    full = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    scale = full.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (weight.float() / spread).to(E4M3)
    return Written({"weight": codes, "weight_scale_inv": scale}, codes.float() * spread)


def fp8_channel(weight: Tensor) -> Written:
    """A bfloat16 scale for every row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 440).bfloat16()
    codes = (weight.float() / scale.float()).to(E4M3)
    return Written({"weight": codes, "weight_scale": scale}, codes.float() * scale.float())


def fp8_tensor(weight: Tensor) -> Written:
    """One scale, without dimensions."""
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).to(E4M3)
    return Written({"weight": codes, "weight_scale": scale}, codes.float() * scale)


def mxfp8(weight: Tensor) -> Written:
    """A power of two for every 32 of a row."""
    groups = weight.float().unflatten(1, (-1, 32))
    power = (groups.abs().amax(2) / 448).log2().ceil().clamp(-127, 127)
    codes = (groups / power.exp2()[..., None]).to(E4M3)
    values = (codes.float() * power.exp2()[..., None]).flatten(1)
    return Written({"weight": codes.flatten(1), "weight_scale": (power + 127).to(torch.uint8)}, values)


def nvfp4(weight: Tensor) -> Written:
    """compressed-tensors: an E4M3 scale for every 16 of a row, and one that divides those of the tensor."""
    of_tensor = (448 * 6 / weight.float().abs().max()).view(1)
    groups = weight.float().unflatten(1, (-1, 16))
    scale = (groups.abs().amax(2) / 6 * of_tensor).to(E4M3)
    real = scale.float() / of_tensor
    packed, values = fp4(groups, real)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": of_tensor}
    return Written(parts, values)


def mxfp4(weight: Tensor) -> Written:
    """compressed-tensors: a power of two for every 32 of a row."""
    groups = weight.float().unflatten(1, (-1, 32))
    power = (groups.abs().amax(2) / 6).log2().ceil().clamp(-127, 127)
    packed, values = fp4(groups, power.exp2())
    return Written({"weight_packed": packed, "weight_scale": (power + 127).to(torch.uint8)}, values)


def fp4(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes of two codes, low nibble first; what they mean) of `(rows, groups, n)` with scales."""
    ratio = (groups / scale[..., None]).nan_to_num(0)
    magnitude = torch.bucketize(ratio.abs().clamp(max=6), (LEVELS[1:] + LEVELS[:-1]) / 2)
    values = (LEVELS[magnitude].copysign(ratio) * scale[..., None]).flatten(1)
    codes = (magnitude + 8 * (ratio < 0)).flatten(1).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, values


def pack_quantized(bits: int, group: int, symmetric: bool = True) -> Callable[[Tensor], Written]:
    """compressed-tensors: integers packed along the rows, bfloat16 scales."""
    middle = 2 ** (bits - 1)

    def write(weight: Tensor) -> Written:
        groups = weight.float().unflatten(1, (-1, group))
        low, high = groups.amin(2), groups.amax(2)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = (span / (2**bits - 1)).bfloat16().clamp(min=1e-9)
        zero = torch.zeros_like(low) if symmetric else (-middle - low / scale.float()).round()
        zero = zero.clamp(-middle, middle - 1)
        codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(-middle, middle - 1)
        values = (codes - zero[..., None]) * scale.float()[..., None]
        parts = {
            "weight_packed": stream(codes.flatten(1).long() + middle, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = stream(zero.t().contiguous().long() + middle, bits).t()
        return Written(parts, values.flatten(1))

    return write


def int_quantized(weight: Tensor) -> Written:
    """compressed-tensors: int8 with a scale for every row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-128, 127)
    return Written({"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float())


def gptq(group: int, act_order: bool = False, bits: int = 4) -> Callable[[Tensor], Written]:
    """Version 2; act-order: groups of inputs that do not stand together."""

    def write(weight: Tensor) -> Written:
        inputs = weight.shape[1]
        order = torch.arange(inputs)
        if act_order:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        sorted_codes, scales, zeros = quantized(weight.float()[:, order], bits, group)
        codes, g_idx = torch.empty_like(sorted_codes), torch.empty_like(order)
        codes[:, order], g_idx[order] = sorted_codes, torch.arange(inputs) // group
        values = (codes - zeros[:, g_idx]).float() * scales.float()[:, g_idx]
        parts = {
            "qweight": stream(codes, bits).t(),
            "qzeros": stream(zeros.t().contiguous(), bits),
            "scales": scales.t(),
            "g_idx": g_idx.int(),
        }
        return Written(parts, values)

    return write


def awq(group: int) -> Callable[[Tensor], Written]:
    """For the gemm kernel."""

    def write(weight: Tensor) -> Written:
        codes, scales, zeros = quantized(weight.float(), 4, group)
        spread = [t.repeat_interleave(group, 1) for t in (zeros, scales.float())]
        parts = {
            "qweight": interleaved(codes.t().contiguous()),
            "qzeros": interleaved(zeros.t().contiguous()),
            "scales": scales.t(),
        }
        return Written(parts, (codes - spread[0]).float() * spread[1])

    return write


def awq_gemv(group: int) -> Callable[[Tensor], Written]:
    """For the gemv kernel: rows of nibbles, filled up to whole words, for small groups to several."""

    def write(weight: Tensor) -> Written:
        codes, scales, zeros = quantized(weight.float(), 4, group)
        groups = scales.shape[1]
        multiple = 8 * max(128 // group, 1)
        filled = [torch.nn.functional.pad(t, (0, -groups % multiple)) for t in (zeros, scales)]
        spread = [t.repeat_interleave(group, 1) for t in (zeros, scales.float())]
        parts = {"qweight": stream(codes, 4), "qzeros": stream(filled[0], 4), "scales": filled[1]}
        return Written(parts, (codes - spread[0]).float() * spread[1])

    return write


def hqq(group: int, bits: int = 4) -> Callable[[Tensor], Written]:
    """Groups along the rows, computed in bfloat16, which rounds twice; codes in planes, the first highest."""
    top = 2**bits - 1
    planes, dtype = (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)

    def text(characters: str) -> Tensor:
        return torch.tensor([ord(c) for c in characters], dtype=torch.uint8)

    def write(weight: Tensor) -> Written:
        flat = weight.float().view(-1, group)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        scale = ((high - low) / top).bfloat16()
        zero = (-low / scale.float()).bfloat16()
        codes = (flat / scale.float() + zero.float()).round().clamp(0, top)
        values = (codes.bfloat16() - zero) * scale
        filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % planes)).int().chunk(planes)
        packed = sum(plane << bits * (planes - 1 - n) for n, plane in enumerate(filled))
        assert isinstance(packed, Tensor)
        parts = {
            "W_q": packed.to(dtype),
            "scale": scale,
            "zero": zero,
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "shape": torch.tensor(weight.shape),
            "axis": torch.tensor(1, dtype=torch.int32),
            "packing": text("3bit_32" if bits == 3 else f"{bits}bit_u8"),
            "compute_dtype": text("torch.bfloat16"),
            "view_as_float": torch.tensor(0, dtype=torch.uint8),
        }
        return Written(parts, values.float().view(weight.shape))

    return write


def torchao_int8(weight: Tensor) -> Written:
    """A scale for every row; the file's metadata tell."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scale).round().clamp(-128, 127)
    told = {"block_size": [1, weight.shape[1]], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    parts = {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scale}
    return Written(parts, codes * scale, {"_type": "Int8Tensor", "_data": told})


def torchao_float8(weight: Tensor) -> Written:
    """A scale for every row of e4m3 codes."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    told = {"block_size": [1, weight.shape[1]], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    parts = {"_weight_qdata": codes, "_weight_scale": scale}
    return Written(parts, codes.float() * scale, {"_type": "Float8Tensor", "_data": told})


def torchao_intx(group: int, bits: int = 4) -> Callable[[Tensor], Written]:
    """Codes of few bits in bytes, scales and zero points of groups."""

    def write(weight: Tensor) -> Written:
        codes, scales, zeros = quantized(weight.float(), bits, group)
        spread = [t.repeat_interleave(group, 1) for t in (zeros, scales.float())]
        told = {"block_size": [1, group], "dtype": {"_type": "torch.dtype", "_data": "float32"}}
        parts = {
            "_weight_qdata": codes.to(torch.int8),
            "_weight_scale": scales.float(),
            "_weight_zero_point": zeros.to(torch.int8),
        }
        values = (codes - spread[0]).float() * spread[1]
        return Written(parts, values, {"_type": "IntxUnpackedToInt8Tensor", "_data": told})

    return write


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config of one group."""
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _float(form: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return compressed(form, num_bits=bits, type="float", strategy=strategy, symmetric=True, **more)


def _int(form: str, bits: int, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return compressed(form, num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, **more)


def formats(group: int = 64) -> dict[str, Format]:
    """All that are written here, by name; `group` inputs share a scale where the format leaves it open."""
    ours = {"bits": 4, "group_size": group}
    v2 = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False, **ours}
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    int4, mixed = pack_quantized(4, group), pack_quantized(4, group, symmetric=False)
    return {
        "FP8 block": Format(fp8_block, fp8),
        "FP8 channel": Format(fp8_channel, _float("float-quantized", 8, "channel")),
        "FP8 tensor": Format(fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        "MXFP8": Format(mxfp8, _float("mxfp8-quantized", 8, "group", group_size=32)),
        "NVFP4": Format(nvfp4, _float("nvfp4-pack-quantized", 4, "tensor_group", group_size=16)),
        "MXFP4": Format(mxfp4, _float("mxfp4-pack-quantized", 4, "group", group_size=32)),
        "int4 packed": Format(int4, _int("pack-quantized", 4, "group", group_size=group)),
        "int4 packed, zero points": Format(
            mixed, _int("pack-quantized", 4, "group", False, group_size=group)
        ),
        "int8 channel": Format(int_quantized, _int("int-quantized", 8, "channel")),
        "GPTQ": Format(gptq(group), v2),
        "GPTQ act-order": Format(gptq(group, True), v2 | {"desc_act": True}),
        "AWQ gemm": Format(awq(group), {"quant_method": "awq", "version": "gemm", **ours}),
        "HQQ": Format(hqq(group), {"quant_method": "hqq"}),
        "torchao int8": Format(torchao_int8, {"quant_method": "torchao"}),
    }


def is_linear(name: str) -> bool:
    """What quantizers quantize of a model: the layers' projections."""
    return name.endswith("proj.weight")


@dataclass(frozen=True)
class Base:
    """A checkpoint of codes, and what all its weights mean: codes in float32, the rest as it is."""

    folder: Path
    weights: Tensors
    coded: frozenset[str]  # names of the weights that are held as codes


def write_base(
    folder: Path,
    dense: Mapping[str, Tensor],
    config: Mapping[str, Any],
    choose: Callable[[str], Format | None],
    *shards: Callable[[str], bool],
) -> Base:
    """The dense weights with those quantized for which `choose` names a format.

    Every tensor goes into the shard of the first of `shards` that takes its name, else into the last one.
    """
    held: list[Tensors] = [{} for _ in range(len(shards) + 1)]
    metadata, weights, coded = {"format": "pt"}, {}, set()
    for name, weight in dense.items():
        form = choose(name)
        written = form.write(weight) if form else Written({"": weight}, weight)
        weights[name] = written.weight
        module = name.removesuffix("weight") if form else name
        if form:
            coded.add(name)
        if written.metadata:
            metadata[name] = json.dumps(written.metadata)
        for last, tensor in written.tensors.items():
            number = next((n for n, takes in enumerate(shards) if takes(module + last)), len(shards))
            held[number][module + last] = tensor.contiguous()
    folder.mkdir()
    files = ["model.safetensors"]
    if shards:
        files = [f"model-{n + 1:05d}-of-{len(held):05d}.safetensors" for n in range(len(held))]
        places = {name: file for file, some in zip(files, held, strict=True) for name in some}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, some in zip(files, held, strict=True):
        save_file(some, folder / file, metadata)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return Base(folder, weights, frozenset(coded))


def write_bitsandbytes(folder: Path, dense: Path, settings: Mapping[str, Any]) -> Base:
    """The model that transformers quantizes and saves, and its weights as bitsandbytes decodes them."""
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    options = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(dense, **options).save_pretrained(folder)
    held, weights = tensors(folder), {}
    for weight in tensors(dense):
        state = {key.removeprefix(f"{weight}."): t for key, t in held.items() if key.startswith(f"{weight}.")}
        scale = held.get(f"{weight.removesuffix('weight')}SCB")
        if state:
            known = functional.QuantState.from_dict(state, torch.device("cpu"))
            known.dtype = torch.float32
            weights[weight] = functional.dequantize_4bit(held[weight], known)
        elif scale is not None:
            weights[weight] = functional.int8_vectorwise_dequant(held[weight], scale)
        else:
            weights[weight] = held[weight]
    return Base(folder, weights, frozenset(n for n, w in weights.items() if w is not held[n]))
