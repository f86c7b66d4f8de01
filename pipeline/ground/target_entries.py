"""The entries by which an adapter_config.json names what was trained, and which of them are answered."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipeline.ground.base_modules import prefixes, suffixes
from pipeline.ground.canonical_names import stack
from pipeline.ground.target_rules import excluding, saving, targeting

# PEFT adds all of a task's names to modules_to_save; a model has one of them.
_TASK_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}}


def unanswered(config: Mapping[str, Any], held: Collection[str]) -> dict[str, list[str]]:
    """By field, the entries for which none of the adapter's modules `held` is there."""
    endings, above = {s for m in held for s in suffixes(m)}, {p for m in held for p in prefixes(m)}
    targets, excluded = config.get("target_modules"), excluding(config)
    parameters = [p for p in config.get("target_parameters") or [] if "." in p]
    saved = [s for s in config.get("modules_to_save") or [] if not any(p.endswith(s) for p in above)]
    named = targets if isinstance(targets, list) else []
    found = {
        "target_modules": [t for t in named if t not in endings and not excluded(t)],
        "target_parameters": [p for p in parameters if p.rpartition(".")[0] not in endings],
        "modules_to_save": _without_spare_heads(saved, config),
        "trainable_token_indices": _tokens(config, held, endings),
    }
    return {field: entries for field, entries in found.items() if entries}


def meant_by(entry: str, field: str, modules: Iterable[str]) -> list[str]:
    """The modules that an entry of this field names."""
    if field == "modules_to_save":
        return [m for m in modules if any(above.endswith(entry) for above in prefixes(m))]
    if field == "target_parameters":
        owner = entry.rpartition(".")[0]
        return [m for m in modules if any(owner in suffixes(above) for above in prefixes(m))]
    return [m for m in modules if entry in suffixes(m)]


def _without_spare_heads(saved: list[str], config: Mapping[str, Any]) -> list[str]:
    heads = _TASK_HEADS.get(config.get("task_type") or "", set())
    has_one = any(s in heads and s not in saved for s in config.get("modules_to_save") or [])
    return [s for s in saved if not (has_one and s in heads)]


def _tokens(config: Mapping[str, Any], held: Collection[str], endings: Collection[str]) -> list[str]:
    """Embeddings without their rows; `embeddings` where the config leaves it to the model which those are.

    Of two that are tied PEFT writes one, if the config has the same rows for both.
    """
    rows = config.get("trainable_token_indices") or {}
    if isinstance(rows, list):
        saved, targeted = saving(config), targeting(config)
        by_table = config.get("target_modules") is None
        others = (m for m in held if not stack(m) and not saved(m) and (by_table or not targeted(m)))
        return [] if any(others) else ["embeddings"]
    written = [indices for module, indices in rows.items() if module in endings]
    return [m for m, indices in rows.items() if indices and m not in endings and indices not in written]
