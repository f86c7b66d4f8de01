"""Dtypes by the names safetensors gives them: how wide each is, and what torch calls it."""

from __future__ import annotations

from enum import Enum
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors name: (bits per element, torch name or None); safetensors 0.8, `Dtype` in tensor.rs
_TABLE: dict[str, tuple[int, str | None]] = {
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}

DENSE_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


class FloatDtype(Enum):
    """The float dtypes a setting may ask for."""

    float64 = "F64"
    float32 = "F32"
    bfloat16 = "BF16"
    float16 = "F16"


def known(dtype: str) -> bool:
    """Whether safetensors has a dtype of this name."""
    return dtype in _TABLE


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor, or None where sub-byte elements do not fill whole bytes."""
    bits = prod(shape) * _TABLE[dtype][0]
    return bits // 8 if bits % 8 == 0 else None


def alignment(dtype: str) -> int:
    """Bytes at a multiple of which a reader expects this dtype's tensors to begin."""
    return max(_TABLE[dtype][0] // 8, 1)


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of the same name."""
    import torch

    name = _TABLE[dtype][1]
    assert name is not None, f"torch has no {dtype}"
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def config_name(dtype: str) -> str:
    """What config.json calls it: bfloat16, float16, ..."""
    return _TABLE[dtype][1] or dtype.lower()
