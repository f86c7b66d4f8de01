"""Adapters that PEFT 0.21 itself runs otherwise than they were trained: no reference for a merged model.

Each was measured (tests/peft_defects.py holds them beside float64). Where PEFT drops tensors it says so when
it loads them, and that is seen there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.experts import Experts, version_of
from pipeline.ground.deltas.lora import Lora

_ONE_EXPERT = re.compile(r".*\.experts\.\d+\..*")
_FIRST_RIGHT = (0, 19, 1)  # before it, square experts lay otherwise


def fault(config: Mapping[str, Any], deltas: Iterable[Delta]) -> str | None:
    """What PEFT does to an adapter of this config that it should not, in words that follow "PEFT"."""
    if config.get("use_rslora") and any(_ONE_EXPERT.fullmatch(delta.module) for delta in deltas):
        return "scales single experts by sqrt(2) where it fuses them (rsLoRA)"
    if str(config.get("init_lora_weights")).startswith("pissa_niter"):
        return "draws the init of this adapter again whenever it loads it (pissa_niter)"
    if any(isinstance(delta, Lora) and ".base_layer.out_proj." in delta.A.name for delta in deltas):
        return "applies the out_proj of a MultiheadAttention twice in some versions"
    square = any(isinstance(delta, Experts) and delta.is_square for delta in deltas)
    if square and (version_of(config.get("peft_version")) or _FIRST_RIGHT) < _FIRST_RIGHT:
        return "takes the square experts of old writers for transposed"
    return None
