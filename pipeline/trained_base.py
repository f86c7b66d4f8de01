"""Which base an adapter was trained on, as far as its config tells, beside the one it is merged onto."""

from __future__ import annotations

import re

from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.report import Finding
from pipeline.pieces import Merged
from pipeline.weight import Adapter, Checkpoint, Decoded, Weight

# What names of quantized checkpoints hold; of the first kind are those that training loads in four bits.
_FOUR_BIT = re.compile(r"bnb|4-?bits?|nf4|fp4(?!\d)|qlora", re.IGNORECASE)
_QUANTIZED = re.compile(r"awq|gptq|fp8|int[48]|8-?bits?|w[48]a\d+|mxfp4|nvfp4|hqq|quantized", re.IGNORECASE)


def which_base(merged: Checkpoint[Weight], adapter: Adapter) -> tuple[Finding, ...]:
    """What to know where the request left open which base is meant, and there is more than one."""
    if not merged.left_open:
        return ()
    names = [str(part.config.get("base_model_name_or_path") or "") for part in adapter.parts]
    kinds = sorted({code for weight in merged.weights if (code := _code(weight))})
    quantized = [name for name in names if _FOUR_BIT.search(name) or _QUANTIZED.search(name)]
    if kinds and not quantized:
        return (
            Finding(
                f"the base is held as {', '.join(kinds)} and merged as that decodes, as an adapter trained "
                "on it needs; one that was trained on the 16-bit model belongs on that"
            ),
        )
    if kinds or not quantized:
        return ()
    ways = f"'{quantized[0]}' as base_model merges onto what training saw"
    if _FOUR_BIT.search(quantized[0]) and not re.search("awq|gptq", quantized[0], re.IGNORECASE):
        ways = f"dequantize=simulate, or {ways}"
    return (
        Finding(
            f"the adapter was trained on '{quantized[0]}', a quantized model, and is merged onto these "
            f"16-bit weights as they are; {ways}; dequantize=none says that 16 bits are meant"
        ),
    )


def _code(weight: Weight) -> str | None:
    """What the codes are called that a weight is held as in the base."""
    while isinstance(weight, Merged):
        weight = weight.base
    held = weight.code.describe if isinstance(weight, Decoded) else None
    return None if held in DENSE_FLOATS else held  # as which GGUF files hold norms
