"""Which of GPTQ's two ways to store zero points a checkpoint uses, and whether its zero points agree.

Version 1 stores z - 1 (AutoGPTQ, AutoRound's auto_round:auto_gptq, gptqmodel's gptq), version 2 stores z
(gptq_v2, gptq_p, auto_round and auto_round:gptqmodel). Nothing said means version 1, as all readers take it.

A stored field of ones is z = 0 less one. Only gptqmodel wrote those so that they can be undone, by
subtracting whole words; AutoGPTQ spoilt the fields above them, and its readers take z = 2^bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.ground.codes.parts import read_bytes
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry

_VERSIONS = {"gptq": (1, False), "gptq_v2": (2, False), "gptq_p": (2, True)}  # (version, in planes)


def declared(settings: Mapping[str, Any]) -> tuple[int, bool]:
    """(version, whether codes lie in planes) as the config says; Refused for packings of single kernels."""
    packing = settings.get("packing_format") or ""
    if settings.get("rotation") or settings.get("rotation_config"):
        raise Refused(
            "quantization_config: its weights are rotated (rotation), which this version cannot undo"
        )
    if "auto-round" in str(settings.get("quant_method")).lower() or packing:
        plain = "gptq" not in packing or "gptqmodel" in packing
        return (2, False) if packing and plain else (1, False)
    said = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format") or said not in _VERSIONS:
        said = "marlin" if settings.get("is_marlin_format") else said
        raise Refused(
            f"quantization_config: checkpoint_format {said!r} is laid out for one GPU kernel and cannot be decoded; "
            "give the checkpoint it was made from (gptq, gptq_v2 or gptq_p), or the model in 16 bits"
        )
    return _VERSIONS[said]


def check_zeros(qzeros: Entry, bits: int, version: int, settings: Mapping[str, Any]) -> None:
    """Refused if the stored zero points contradict the version, or cannot be told under it."""
    raw = read_bytes(qzeros)
    middle = 2 ** (bits - 1)  # of a symmetric checkpoint, stored so by version 2 and one less by version 1
    other = {1: 2, 2: 1}[version]
    if bits in (2, 3, 4, 8) and raw == _repeated(middle + 1 - other, bits, len(raw)):
        raise Refused(
            f"{qzeros.name}: holds {middle + 1 - other} throughout, the middle of {bits} bits as version {other} "
            f"stores it, but checkpoint_format {settings.get('checkpoint_format')!r} means version {version}; "
            f"set it to {'gptq_v2' if other == 2 else 'gptq'} if that is what wrote it"
        )
    if version == 1 and _any_ones(raw, bits) and not (_by_gptqmodel(settings) and bits != 3):
        raise Refused(
            f"{qzeros.name}: holds zero points stored as {2**bits - 1}, which version 1 cannot tell from 0 and "
            f"{2**bits}; give the checkpoint as gptq_v2, or the model in 16 bits"
        )


def _repeated(field: int, bits: int, length: int) -> bytes:
    """Fields of one value, `length` bytes of them."""
    turn = sum(field << bits * i for i in range(96 // bits)).to_bytes(12, "little")
    return (turn * (length // 12 + 1))[:length]


def _any_ones(raw: bytes, bits: int) -> bool:
    """Whether a field is all ones."""
    number = int.from_bytes(raw, "little")
    ones = number
    for place in range(1, bits):
        ones &= number >> place
    return ones & int.from_bytes(_repeated(1, bits, len(raw)), "little") != 0


def _by_gptqmodel(settings: Mapping[str, Any]) -> bool:
    writers = (settings.get("meta") or {}).get("quantizer") or []
    writers = [writers] if isinstance(writers, str) else writers
    return any(str(writer).lower().startswith("gptqmodel") for writer in writers)
