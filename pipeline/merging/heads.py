"""A classifier's head that an adapter was trained with and brings along to a language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.report import Finding
from pipeline.merging.pieces import FromAdapter
from pipeline.weight import Adapter, Checkpoint, Weight

# PEFT's task_type: what transformers calls the class, and how its head may be called.
_CLASSES = {
    "SEQ_CLS": ("ForSequenceClassification", ("score", "classifier")),
    "TOKEN_CLS": ("ForTokenClassification", ("score", "classifier")),
    "QUESTION_ANS": ("ForQuestionAnswering", ("qa_outputs",)),
}


def with_heads(
    base: Checkpoint[Weight], adapter: Adapter, homeless: Sequence[Delta]
) -> tuple[Checkpoint[Weight], list[Delta]]:
    """The checkpoint with the head that the adapter brings, and the deltas that still fit nowhere.

    The config names the class that has this head and as many labels as it has rows; an lm_head of its own
    is left out, since that class has none.
    """
    task = adapter.parts[0].config.get("task_type")
    if len(adapter.parts) > 1 or task not in _CLASSES:
        return base, list(homeless)
    suffix, names = _CLASSES[task]
    head = [d for d in homeless if isinstance(d, Saved) and set(d.module.split(".")) & set(names)]
    if not head:
        return base, list(homeless)
    added = [FromAdapter(f"{d.module}.{d.parameter}", d.shape, base.dtype, d.entry) for d in head]
    dropped = [w for w in base.weights if w.name.split(".")[-2:] == ["lm_head", "weight"]]
    architectures = base.config.read().get("architectures") or []
    edits: dict[str, Any] = {
        "architectures": [re.sub(r"For[A-Z]\w*$|LMHeadModel$", "", a) + suffix for a in architectures[:1]]
    }
    told = f"{added[0].name} is added from the adapter and the model becomes {edits['architectures']}"
    told += f"; {dropped[0].name} is left out" if dropped else ""
    grown = replace(
        base,
        weights=(*(w for w in base.weights if w not in dropped), *added),
        config_edits={**base.config_edits, **edits, **labels([w for w in added if len(w.shape) == 2])},
        findings=(*base.findings, Finding(told)),
    )
    return grown, [d for d in homeless if d not in head]


def is_head(name: str) -> bool:
    """Whether a weight is a parameter of a classifier's head."""
    return bool(set(name.split(".")) & {head for _, heads in _CLASSES.values() for head in heads})


def labels(weights: Sequence[Weight]) -> dict[str, Any]:
    """The config's labels for a head whose last layer has as many rows."""
    if not weights:
        return {}
    count = weights[-1].shape[0]
    return {
        "id2label": {str(n): f"LABEL_{n}" for n in range(count)},
        "label2id": {f"LABEL_{n}": n for n in range(count)},
    }
