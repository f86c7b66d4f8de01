"""Outputs of every format of save.quantize, and how to look at them: for the tests that share them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.ground.written import Written

BNB = ["nf4", "nf4-dq", "fp4", "int8"]
FORMATS = [*BNB, "fp8-block", "fp8-channel", "int4-g128"]
FILES_ONLY = {"tokens": 0}
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [n for n in found if found[n].dtype != wanted[n].dtype or raw(found[n]) != raw(wanted[n])] == []


def quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every weight, codes decoded in float32."""
    found = Written(folder)
    shapes = {name: shape for name, _, shape in found.facts()}
    shapes |= {name: code.shape for name, code in found.codes.items()}
    beside = {e.name for code in found.codes.values() for e in code.entries} - found.codes.keys()
    return {
        name: found.rows(name, 0, prod(shape[:-1])).view(shape)
        for name, shape in shapes.items()
        if name not in beside
    }
