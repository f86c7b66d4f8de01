"""Which base an adapter was trained on, as far as its config tells, beside the one it is merged onto."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import lcm, sqrt
from statistics import median
from typing import NamedTuple

from pipeline.ground import tiles
from pipeline.ground.codes.encoders.linear import is_linear
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.metrics import SAMPLED_ELEMENTS, SAMPLED_TILES, is_sampled
from pipeline.ground.names import is_conv1d
from pipeline.ground.report import Finding
from pipeline.merging.pieces import Merged
from pipeline.simulated import Simulated
from pipeline.weight import Adapter, Checkpoint, Decoded, Dense, Weight

# What names of quantized checkpoints hold; of the first kind are those that training loads in four bits.
_FOUR_BIT = re.compile(r"bnb|4-?bits?|nf4|fp4(?!\d)|qlora", re.IGNORECASE)
_QUANTIZED = re.compile(r"awq|gptq|fp8|int[48]|8-?bits?|w[48]a\d+|mxfp4|nvfp4|hqq|quantized", re.IGNORECASE)
_LOOKED_AT = SAMPLED_ELEMENTS * SAMPLED_TILES  # elements of a weight, smaller ones whole


class Bases(NamedTuple):
    """What to know of the two bases that may be meant."""

    findings: tuple[Finding, ...] = ()
    shifts: Mapping[str, float] = {}  # ||W16 - NF4(W16)|| / ||delta|| of merged weights, by name


def which_base(merged: Checkpoint[Weight], adapter: Adapter) -> Bases:
    """What to know where the request left open which base is meant, and there is more than one."""
    if not merged.left_open or any(part.extraction for part in adapter.parts):
        return Bases()
    names = [str(part.config.get("base_model_name_or_path") or "") for part in adapter.parts]
    kinds = sorted({code for weight in merged.weights if (code := _code(weight))})
    quantized = [name for name in names if _FOUR_BIT.search(name) or _QUANTIZED.search(name)]
    if kinds and not quantized:
        told = (
            f"the base is held as {', '.join(kinds)} and merged as that decodes, as an adapter trained "
            "on it needs; one that was trained on the 16-bit model belongs on that"
        )
        return Bases((Finding(told),))
    if kinds or not quantized:
        return Bases()
    ways, shifts = f"'{quantized[0]}' as base_model merges onto what training saw", dict[str, float]()
    if _FOUR_BIT.search(quantized[0]) and not re.search("awq|gptq", quantized[0], re.IGNORECASE):
        ways = f"dequantize=simulate, or {ways}"
        shifts = _shifts(merged)
    told = (
        f"the adapter was trained on '{quantized[0]}', a quantized model, and is merged onto these "
        f"16-bit weights as they are; {ways}; dequantize=none says that 16 bits are meant{_apart(shifts)}"
    )
    return Bases((Finding(told),), shifts)


def _apart(shifts: dict[str, float]) -> str:
    """How far the two bases are apart, in words."""
    if not shifts:
        return ""
    most = max(shifts, key=lambda name: shifts[name])
    return (
        f"; these weights are {median(shifts.values()):.3g} times the delta away from what NF4 makes of them "
        f"(median of {len(shifts)} weights, {shifts[most]:.3g} in {most}): so much depends on the base"
    )


def _shifts(merged: Checkpoint[Weight]) -> dict[str, float]:
    """`Bases.shifts`, of a sample of every merged linear layer."""
    kind, found = merged.config.model_type, {}
    for weight in merged.weights:
        if not isinstance(weight, Merged) or not isinstance(weight.base, Dense):
            continue
        linear = is_linear(weight.name, weight.shape, experts=False)
        turned = is_conv1d(kind, weight.name, weight.shape)
        if linear and not turned and (shift := _shift(weight)) is not None:
            found[weight.name] = shift
    return found


def _shift(weight: Merged) -> float | None:
    """Of one weight; None where its delta is zero. Blocks of 64, whose scales are taken as they are."""
    four = Simulated(weight.name, weight.shape, weight.dtype, weight.base, "nf4", 64, double_quant=False)
    grain, shift, energy = lcm(weight.grain, four.grain), 0.0, 0.0
    grid = list(tiles.grid(weight.num_rows, weight.num_columns, grain))
    looked = [block for n, block in enumerate(grid) if is_sampled(n, len(grid))]
    rows = -(-max(_LOOKED_AT // len(looked) // weight.num_columns, 1) // grain) * grain
    with weight.open("cpu") as merging, four.open("cpu") as simulating:
        for start, stop in looked:
            tile = merging(start, min(start + rows, stop))
            moved = (simulating(start, min(start + rows, stop)).value - tile.base.float()).flatten()
            shift += float(moved.dot(moved))
            energy += float(tile.delta.double().square().sum()) if tile.delta is not None else 0.0
    return sqrt(shift / energy) if energy else None


def _code(weight: Weight) -> str | None:
    """What the codes are called that a weight is held as in the base."""
    while isinstance(weight, Merged):
        weight = weight.base
    held = weight.code.describe if isinstance(weight, Decoded) else None
    return None if held in DENSE_FLOATS else held  # as which GGUF files hold norms
