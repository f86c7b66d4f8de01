"""A checkpoint with an adapter in it, as a plan: which weights are merged, added, resized."""

from __future__ import annotations

from dataclasses import replace
from math import fsum

from pipeline.ground.combining import Combination
from pipeline.ground.errors import Refused
from pipeline.ground.report import Finding, unique
from pipeline.merging.binding import Bound, bind, unknown_modules
from pipeline.merging.combined import Combined
from pipeline.merging.contents import promises
from pipeline.merging.heads import is_head, labels, with_heads
from pipeline.merging.pieces import Merged, Placed
from pipeline.merging.tying import EMBEDDINGS, HEADS, settle
from pipeline.weight import Adapter, Checkpoint, Merging, Weight


def merged(base: Checkpoint[Weight], adapter: Adapter, asked: Merging, arithmetic: str) -> Checkpoint[Weight]:
    """The checkpoint whose weights are base + factor * delta in `arithmetic`; Refused for a misfit.

    Deltas of several adapters are summed with their weights, or combined as asked.
    """
    adapter = normalized(adapter) if asked.normalize else adapter
    found = [Finding(text) for text in promises(base, adapter, asked.renames)]
    base, adapter = settle(base, adapter, asked.tied)
    bound = bind(base, adapter, asked.factor, asked.renames)
    base, homeless = with_heads(base, adapter, bound.homeless)
    if homeless:
        raise Refused(unknown_modules(base, homeless))
    _check_vocabulary(base, bound)
    weights = tuple(_merged(weight, bound, arithmetic, asked.combination) for weight in base.weights)
    heads = [w for w in bound.whole.values() if is_head(w.name) and w.name.endswith(".weight")]
    return replace(
        base,
        weights=weights,
        config_edits={**base.config_edits, **_vocabulary(bound), **labels(heads)},
        findings=tuple(unique(base.findings, adapter.findings, found)),
        merging=asked,
    )


def _merged(weight: Weight, bound: Bound, arithmetic: str, combination: Combination | None) -> Weight:
    under = bound.whole.get(weight.name, weight)
    placed = bound.placed.get(weight.name, [])
    return with_deltas(under, placed, arithmetic, combination) if placed else under


def with_deltas(
    weight: Weight, placed: list[Placed], arithmetic: str, combination: Combination | None = None
) -> Merged:
    """The weight with these pieces; a float64 weight is never computed in less."""
    dtype = "F64" if weight.dtype == "F64" else arithmetic
    plain = Merged(weight.name, weight.shape, weight.dtype, weight, tuple(placed), dtype)
    return Combined(**{**vars(plain), "combination": combination}) if combination else plain


def normalized(adapter: Adapter) -> Adapter:
    """The adapters with their weights divided by their sum; Refused where that would void or turn them."""
    total = fsum(part.weight for part in adapter.parts)
    if total <= 0:
        raise Refused(
            f"merge.normalize: the adapters' weights sum to {total:g}; a mean needs a sum above 0, "
            "normalize=false takes them as they are"
        )
    return Adapter(tuple(replace(part, weight=part.weight / total) for part in adapter.parts))


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
