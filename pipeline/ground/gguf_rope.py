"""Rotary scaling that a GGUF file holds as a table of factors, brought back to what config.json says.

llama.cpp's converter (`conversion/llama.py`, rope_type llama3) writes rope_freqs.weight: for each pair of a
head the factor by which its frequency is divided. transformers does not read it back.
"""

from __future__ import annotations

import struct
from math import isclose, pi
from typing import Any

from pipeline.ground.errors import Refused
from pipeline.ground.files import File, read_into
from pipeline.ground.gguf import GgufHeader, GgufTensor

_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192  # what every Llama 3.1 and later has; the table proves it


def rope_parameters(header: GgufHeader) -> dict[str, Any] | None:
    """The config's rope_parameters where the file scales its rotary frequencies; None where it does not.

    Refused for a scaling that cannot be proved to be the one that the config would then say.
    """
    architecture = str(header.metadata["general.architecture"])
    kind = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("none", ""):
        raise Refused(f"{header.path}: {architecture}.rope.scaling.type is '{kind}', which is not supported")
    tables = [t for t in header.tensors if t.name.startswith("rope_")]
    if any(table.name != "rope_freqs.weight" for table in tables):
        raise Refused(f"{header.path}: '{tables[0].name}' scales rotary frequencies, which is not supported")
    factors = [factor for table in tables for factor in _floats(header, table)]
    if all(factor == 1 for factor in factors):
        return None
    theta = header.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    assert isinstance(theta, float | int)
    wanted = _llama3(float(theta), len(factors), max(factors))
    if not all(isclose(a, b, rel_tol=1e-5) for a, b in zip(factors, wanted, strict=True)):
        raise Refused(
            f"{header.path}: rope_freqs.weight is not the scaling of Llama 3, the only one supported"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": float(theta),
        "factor": float(max(factors)),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _CONTEXT,
    }


def _floats(header: GgufHeader, table: GgufTensor) -> tuple[float, ...]:
    if table.type != "F32":
        raise Refused(f"{header.path}: '{table.name}' is {table.type}, not F32")
    buffer = bytearray(table.length)
    with File.at(header.path).opened() as descriptor:
        read_into(descriptor, table.offset, memoryview(buffer))
    return struct.unpack(f"<{table.length // 4}f", buffer)


def _llama3(theta: float, pairs: int, factor: float) -> list[float]:
    """The factors of rope_type llama3 (transformers, modeling_rope_utils.py)."""
    factors = []
    for pair in range(pairs):
        wavelength = 2 * pi * theta ** (pair / pairs)
        if wavelength < _CONTEXT / _HIGH:
            factors.append(1.0)
        elif wavelength > _CONTEXT / _LOW:
            factors.append(factor)
        else:
            smooth = (_CONTEXT / wavelength - _LOW) / (_HIGH - _LOW)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
