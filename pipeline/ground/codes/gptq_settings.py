"""What the decoding of GPTQ depends on - bits, groups, how zero points are stored - and whether all agree.

Version 1 stores z - 1 (AutoGPTQ, AutoRound's auto_round:auto_gptq, gptqmodel's gptq), version 2 stores z
(gptq_v2, gptq_p, auto_round and auto_round:gptqmodel). Nothing said means version 1, as its readers take it.

A stored field of ones is z = 0 less one. Only gptqmodel wrote those so that they can be undone, by
subtracting whole words; AutoGPTQ spoilt the fields above them, and its readers take z = 2^bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.ground.codes.parts import Parts, mentioned, named, numbers
from pipeline.ground.codes.reading import refusal
from pipeline.ground.errors import Refused
from pipeline.ground.files import read_into
from pipeline.ground.shards import Entry

_VERSIONS = {"gptq": (1, False), "gptq_v2": (2, False), "gptq_p": (2, True)}  # (version, in planes)


def ours(parts: Parts, settings: Mapping[str, Any]) -> bool:
    """Whether a module with `qweight` is GPTQ's: by g_idx, by its shapes, or because the config says so."""
    if parts["qweight"].dtype != "I32" or "g_idx" in parts:
        return parts["qweight"].dtype == "I32"
    method = f"{settings.get('quant_method')} {settings.get('packing_format')}".lower()
    shapes = [parts[part].shape for part in ("qweight", "qzeros", "scales") if part in parts]
    fits = len(shapes) == 3 and shapes[0][1:] == shapes[2][1:] and shapes[1][:1] == shapes[2][:1]
    return "awq" not in method and (fits or "gptq" in method)


def declared(settings: Mapping[str, Any]) -> tuple[int, bool]:
    """(version, whether codes lie in planes) as the config says; Refused for layouts of single kernels."""
    if settings.get("rotation") or settings.get("rotation_config"):
        raise Refused("quantization_config: rotation: its weights are rotated, which cannot be undone here")
    packing = str(settings.get("packing_format") or settings.get("backend") or "")
    if "auto-round" in str(settings.get("quant_method")) or packing.startswith("auto_round"):
        plain = packing.startswith("auto_round") and ("gptq" not in packing or "gptqmodel" in packing)
        return (2, False) if plain else (1, False)
    said = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    said = "marlin" if settings.get("is_marlin_format") else said
    if said not in _VERSIONS:
        raise Refused(
            f"quantization_config: checkpoint_format {said!r} is laid out for one kernel and cannot be "
            f"decoded; give the same model as {', '.join(_VERSIONS)}, or in 16 bits"
        )
    return _VERSIONS[said]


def bits_and_inputs(parts: Parts, planar: bool, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bits of a code and inputs of the layer, as the shapes have them; Refused if no or many bits fit."""
    qweight, qzeros, scales = (parts[part] for part in ("qweight", "qzeros", "scales"))
    all_bits = planar or "auto-round" in str(settings.get("quant_method"))  # it packs 5, 6 and 7 as 3
    said = mentioned(settings, "bits")
    choices = [b for b in (range(2, 9) if all_bits else (2, 3, 4, 8)) if not said or b in said]
    right = qzeros.dtype == "I32" and scales.dtype in {"F16", "BF16", "F32"}
    right &= 0 not in (*qweight.shape, *scales.shape)
    right &= "g_idx" not in parts or len(parts["g_idx"].shape) == 1
    if right and len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        (words, outputs), (groups, columns) = qweight.shape, qzeros.shape
        told = parts["g_idx"].shape[0] if "g_idx" in parts else None
        inputs = {bits: words * 32 // bits if told is None else told for bits in choices}
        fitting = [
            bits
            for bits in choices
            if scales.shape == (groups, outputs)
            and (columns, words) == (-(-outputs * bits // 32), -(-inputs[bits] * bits // 32))
            and (32 % bits == 0 or words % bits == columns % bits == 0)
        ]
        if len(fitting) == 1:
            return fitting[0], inputs[fitting[0]]
    raise refusal(
        qweight,
        f"does not fit together as GPTQ of {' or '.join(map(str, choices)) or said} bits: {named(parts)}",
    )


def group_size(
    qweight: Entry, inputs: int, groups: int, g_idx: Entry | None, settings: Mapping[str, Any]
) -> int | None:
    """Inputs per group where groups are neighbours, None where `g_idx` says otherwise."""
    if g_idx is None:
        said, group = mentioned(settings, "group_size"), inputs // groups
        if group * groups != inputs or (said and group not in said and not (groups == 1 and -1 in said)):
            raise refusal(
                qweight, f"has {inputs} inputs in {groups} groups, not group_size {said}, and no g_idx"
            )
        return group
    order = numbers(g_idx)
    low, high, group = min(order), max(order), order.count(0)
    if low < 0 or high >= groups:
        raise refusal(g_idx, f"names groups {low} to {high}, but there are {groups}")
    if groups > 1 and high == 0:
        raise refusal(g_idx, f"is all zero though there are {groups} groups, which readers take differently")
    return group if group and order == [k // group for k in range(inputs)] else None


def check_zeros(qzeros: Entry, bits: int, version: int, settings: Mapping[str, Any]) -> None:
    """Refused if the stored zero points contradict the version, or cannot be told under it."""
    raw = bytearray(qzeros.extent.length)
    with qzeros.extent.file.opened() as descriptor:
        read_into(descriptor, qzeros.extent.offset, memoryview(raw))
    middle = 2 ** (bits - 1)  # what symmetric zero points are
    ours, theirs, other = (middle - 1, middle, 2) if version == 1 else (middle, middle - 1, 1)
    if raw == _repeated(ours, bits, len(raw)):
        return
    if raw == _repeated(theirs, bits, len(raw)):
        said = settings.get("checkpoint_format") or settings.get("packing_format")
        raise refusal(
            qzeros,
            f"holds {theirs} throughout, which is how version {other} stores symmetric zero points, but "
            f"checkpoint_format {said!r} means version {version}: one is wrong",
        )
    if version == 1 and _any_ones(raw, bits) and (bits == 3 or not _by_gptqmodel(settings)):
        raise refusal(
            qzeros,
            f"holds zero points stored as {2**bits - 1}, which in version 1 may mean 0 or {2**bits}; "
            "give the same model as gptq_v2, or in 16 bits",
        )


def _repeated(field: int, bits: int, length: int) -> bytes:
    """Fields of one value in a stream of `length` bytes."""
    turn = sum(field << bits * i for i in range(8)).to_bytes(bits, "little")
    return (turn * (length // bits + 1))[:length]


def _any_ones(raw: bytes | bytearray, bits: int) -> bool:
    """Whether a field is all ones."""
    number = int.from_bytes(raw, "little")
    ones = number & int.from_bytes(_repeated(1, bits, len(raw)), "little")
    for place in range(1, bits):
        ones &= number >> place
    return ones != 0


def _by_gptqmodel(settings: Mapping[str, Any]) -> bool:
    meta = settings.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    writers = [writers] if isinstance(writers, str) else writers or []
    return any(str(writer).lower().startswith("gptqmodel") for writer in writers)
