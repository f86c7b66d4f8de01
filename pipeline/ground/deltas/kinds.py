"""All adapter kinds, by peft_type."""

from __future__ import annotations

from pipeline.ground.deltas import (
    adalora,
    boft,
    c3a,
    delora,
    fourierft,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora_family,
    miss,
    oft,
    randlora,
    shira,
    tokens,
    vblora,
    vera,
)
from pipeline.ground.deltas.kind import Kind

_FILES = (
    lora_family,
    adalora,
    boft,
    c3a,
    delora,
    fourierft,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    miss,
    oft,
    randlora,
    shira,
    tokens,
    vblora,
    vera,
)
KINDS: dict[str, Kind] = {file.KIND.peft_type: file.KIND for file in _FILES}

_PROMPT = "it puts trained tokens before the prompt and changes no weight"
_ROUTED = "it mixes adapters by the input"
_WHOLE = "what it makes of a weight depends on that weight in a way this version does not compute"

NOT_MERGEABLE: dict[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), _PROMPT
    ),
    **dict.fromkeys(("CARTRIDGE", "ADAPTION_PROMPT"), _PROMPT),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW"), _ROUTED),
    **dict.fromkeys(
        ("OSF", "PSOFT", "FROD", "PEANUT", "GLORA", "DEFT", "SUPERTUNING", "ADAMSS", "ROAD"), _WHOLE
    ),
    **dict.fromkeys(("BEFT", "UNILORA", "TINYLORA", "WAVEFT", "PVERA"), "this version has no formula for it"),
}
