"""A checkpoint with an adapter in it, as a plan: which weights are merged, added, resized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipeline.binding import Bound, bind, unknown_modules
from pipeline.ground.errors import Refused
from pipeline.heads import is_head, labels, with_heads
from pipeline.tying import EMBEDDINGS, HEADS, Tied, settle
from pipeline.weight import Adapter, Checkpoint, Merged, Placed, Weight


def merged(
    base: Checkpoint[Weight],
    adapter: Adapter,
    factor: float,
    arithmetic: str,
    renames: Mapping[str, str],
    tied: Tied,
) -> Checkpoint[Weight]:
    """The checkpoint whose weights are base + factor * delta in `arithmetic`; Refused for a misfit."""
    base, adapter = settle(base, adapter, tied)
    bound = bind(base, adapter, factor, renames)
    base, homeless = with_heads(base, adapter, bound.homeless)
    if homeless:
        raise Refused(unknown_modules(base, homeless))
    _check_vocabulary(base, bound)
    weights = tuple(_merged(weight, bound, arithmetic) for weight in base.weights)
    heads = [w for w in bound.whole.values() if is_head(w.name) and w.name.endswith(".weight")]
    return replace(
        base,
        weights=weights,
        config_edits={**base.config_edits, **_vocabulary(bound), **labels(heads)},
        findings=(*base.findings, *(f for f in adapter.findings if f not in base.findings)),
    )


def _merged(weight: Weight, bound: Bound, arithmetic: str) -> Weight:
    under = bound.whole.get(weight.name, weight)
    placed = bound.placed.get(weight.name, [])
    return with_deltas(under, placed, arithmetic) if placed else under


def with_deltas(weight: Weight, placed: list[Placed], arithmetic: str) -> Merged:
    """The weight with these pieces; a float64 weight is never computed in less."""
    dtype = "F64" if weight.dtype == "F64" else arithmetic
    return Merged(weight.name, weight.shape, weight.dtype, weight, tuple(placed), dtype)


def _check_vocabulary(base: Checkpoint[Weight], bound: Bound) -> None:
    """Refused if embeddings and lm_head would differ in how many tokens they know."""
    rows = {w.name: bound.whole.get(w.name, w).shape[0] for w in base.weights if _is_vocabulary(w)}
    resized = [name for name in rows if name in bound.whole]
    if resized and len(set(rows.values())) > 1:
        other = next(name for name in rows if rows[name] != rows[resized[0]])
        raise Refused(
            f"adapter: resizes {resized[0]} to {rows[resized[0]]} tokens, but {other} has {rows[other]}; "
            "the adapter should hold both"
        )


def _vocabulary(bound: Bound) -> dict[str, int]:
    sizes = {weight.shape[0] for weight in bound.whole.values() if _is_vocabulary(weight)}
    return {"vocab_size": sizes.pop()} if sizes else {}


def _is_vocabulary(weight: Weight) -> bool:
    return len(weight.shape) == 2 and weight.name.split(".")[-2:][0] in (*EMBEDDINGS, *HEADS)
