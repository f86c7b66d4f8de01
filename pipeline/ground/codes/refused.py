"""Formats that are recognised but not decoded: refused in one sentence that says what to give instead.

Most of them lie in the order in which one GPU kernel reads them, or hold rotated weights, and those kernels
are their only readers. Names of tensors: the integrations of transformers 5.23, AutoGPTQ 0.7.1, gptqmodel
7.7.0, exllamav2, exllamav3 and older compressed-tensors. (AWQ's other layouts are refused in awq.py.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from pipeline.ground.codes.code import Found, Quantization
from pipeline.ground.codes.reading import refusal
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry


class _Format(NamedTuple):
    """`parts`: the last names of the tensors that a module of this format has, the rarest first, as `name` or
    `name:DTYPE`; the first is named in the sentence."""

    name: str
    parts: str
    why: str
    instead: str = "give the model in 16 bits that it was made from"


_KERNEL = "laid out for one GPU kernel"
_FORMATS = (
    _Format("EETQ", "weight_scales weight:I8", "laid out for the kind of GPU that wrote it"),
    _Format("quanto", "_data _scale", "without a settled layout in files"),
    _Format("bitnet", "weight_scale weight:U8", "ternary, for layers that also round their inputs"),
    _Format("marlin", "B:I32 s", _KERNEL, "give the GPTQ checkpoint that it was made from"),
    _Format("marlin 2:4", "B_24:I32 B_meta", _KERNEL),
    _Format("marlin-24", "scale_packed weight_packed:I32", _KERNEL),
    _Format("QQQ", "s_channel B:I32", _KERNEL),
    _Format("AQLM", "codebooks codes scales", "sums of codebooks"),
    _Format("HIGGS", "tables2 tables scales weight", "rotated, as points of a grid"),
    _Format("SpQR", "dense_weights row_offsets col_vals", _KERNEL),
    _Format("VPTQ", "indices centroids.weight", "vectors of codebooks"),
    _Format("EXL2", "q_weight:I32 q_scale q_groups", _KERNEL),
    _Format("EXL3", "trellis:I16 svh", "rotated, as paths of a trellis"),
    _Format("EXL3", "trellis:I16 sv", "rotated, as paths of a trellis"),
    _Format("fp_quant", "forward_hadamard_matrix qweight:U8", "rotated"),
    _Format("fp_quant", "dqweight", "rotated"),
    _Format("SINQ", "W_q meta", "described by a pickle"),
    _Format(
        "MLX", "biases scales weight:U32", "read by MLX alone", "write it with mlx_lm.convert --dequantize"
    ),
    _Format("metal", "qbiases scales weight:U32", "read by MLX alone"),
    _Format("compressed-tensors' sparse bitmask", "bitmask compressed", "no longer read by anyone"),
)


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Nothing; Refused, with a sentence for each format that is here."""
    anchors: dict[str, list[_Format]] = {}
    for one in _FORMATS:
        anchors.setdefault(one.parts.partition(" ")[0].partition(":")[0].rpartition(".")[2], []).append(one)
    seen: dict[_Format, list[Entry]] = {}
    for name, entry in tensors.items():
        for one in anchors.get(name.rpartition(".")[2], ()):
            if _is(one, name, tensors):
                seen.setdefault(one, []).append(entry)
    if seen:
        raise Refused.together(_sentence(one, entries) for one, entries in seen.items())
    yield from ()


def _is(one: _Format, name: str, tensors: Mapping[str, Entry]) -> bool:
    wanted = [part.partition(":") for part in one.parts.split()]
    module = name.removesuffix(wanted[0][0])
    if module == name or (module and not module.endswith(".")):
        return False
    held = [(tensors.get(module + last), dtype) for last, _, dtype in wanted]
    if any(entry is None or (dtype and entry.dtype != dtype) for entry, dtype in held):
        return False
    if one.name == "bitnet":  # one scale of plain floats: FP4 in bytes has many, or narrow ones
        scale = tensors[name]
        return prod(scale.shape) == 1 and scale.dtype in {"F32", "F16", "BF16"}
    return True


def _sentence(one: _Format, entries: list[Entry]) -> Refused:
    many = f" (as do {len(entries) - 1} more)" if len(entries) > 1 else ""
    return refusal(entries[0], f"belongs to {one.name}{many}, which is {one.why}; {one.instead}")
