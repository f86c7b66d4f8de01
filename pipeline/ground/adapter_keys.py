"""What the key of a tensor in an adapter file means, apart from those that `deltas/` reads.

PEFT writes a module that was saved whole under its plain name. Where the vocabulary was resized it adds all
that its wrappers of the embeddings hold, under names of their own: `modules_to_save` is the same tensor
again, `original_module` what training left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.ground.deltas.kind import Kind
from pipeline.ground.deltas.lora_family import NESTED
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.shards import Entry

EMBEDDINGS = frozenset(
    ["embed_tokens", "lm_head", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embed_out", "shared"]
)
_FOREIGN = (
    (".lora_down.", "kohya's names"),
    (".lora_up.", "kohya's names"),
    (".processor.", "diffusers' names"),
)

_WRAPPED = ".modules_to_save"
_LEFT_BEHIND = ".original_module"
_TOKENS = ".token_adapter"


def as_peft_names_it(key: str, kind: Kind) -> str:
    """The key without the adapter name `default`, a vector without `.weight`: what some writers leave in."""
    key = re.sub(r"\.default(?=(\.weight|\.bias)?$)", "", key)
    bare = key.removesuffix(".weight")
    return bare if any(bare.endswith(f".{suffix}") for suffix in kind.tensors) else key


def is_left_behind(inside: str, config: Mapping[str, Any]) -> bool:
    """Whether it is what a module that is saved whole was before training."""
    path = inside.rpartition(".")[0]
    return path.endswith(_LEFT_BEHIND) and _is_wrapped(path.removesuffix(_LEFT_BEHIND), config)


def saved(inside: str, entry: Entry, config: Mapping[str, Any]) -> Saved | None:
    """A parameter saved whole, if the config accounts for it."""
    path, _, parameter = inside.rpartition(".")
    nested = path.endswith(NESTED)
    module = path.removesuffix(NESTED).removesuffix(_TOKENS if nested else "").removesuffix(_WRAPPED)
    if NESTED in module or not module:
        return None
    whole = _is_saved_module(module, config)
    if path.endswith(_WRAPPED) and not _is_wrapped(module, config):
        return None
    trained_bias = parameter == "bias" and config.get("bias", "none") != "none"
    embedding = parameter == "weight" and module.rpartition(".")[2] in EMBEDDINGS
    if whole or trained_bias or embedding or (nested and parameter == "weight"):
        return Saved(module, parameter, entry.shape, entry)
    return None


def _is_wrapped(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT wraps it to save it whole; what is tied to such a module it wraps along."""
    tied = config.get("ensure_weight_tying") and module.rpartition(".")[2] in EMBEDDINGS
    return bool(tied) or _is_saved_module(module, config)


def _is_saved_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether it, or one above it, ends like an entry of modules_to_save - as PEFT has it, without a dot."""
    parts = module.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(path.endswith(entry) for path in above for entry in config.get("modules_to_save") or [])


def foreign(name: str) -> str:
    return next((f" ({whose})" for part, whose in _FOREIGN if part in name), "")
