"""Embeddings that lm_head shares: what becomes of them when an adapter changes one side, or both.

A checkpoint with tied embeddings holds them once. A delta on one side is meant for that side (spec of the
adapters, section 6), so `auto` writes an lm_head of its own and says so in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.dora import Dora
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.deltas.tokens import TokenRows
from pipeline.ground.entries import is_transpose, same_values
from pipeline.ground.errors import Refused
from pipeline.ground.report import Finding
from pipeline.weight import Adapter, Checkpoint, Part, Tied, Weight

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
HEADS = ("lm_head", "embed_out")
_WHISPER = "proj_out"  # on top; others call other layers so
KEY = "tie_word_embeddings"


def settle(base: Checkpoint[Weight], adapter: Adapter, policy: Tied) -> tuple[Checkpoint[Weight], Adapter]:
    """Base and adapter such that each delta has a weight of its own, or is meant for the shared one."""
    embeddings, head = _embeddings(base), _head(base)
    sides = [_sides(part, embeddings) for part in adapter.parts if embeddings]
    touching = [side for side in sides if side.on_embeddings or side.on_head]
    if embeddings is None or not touching or base.config.tied is False:
        return base, adapter
    if base.config.tied is None and head is not None:
        return _says_untied(base), adapter
    if policy is Tied.refuse:
        raise Refused(
            f"tied: the adapter changes {touching[0].first.module}, but the base shares its embeddings with "
            f"lm_head ({KEY}) and tied=refuse; tied=untie writes both, tied=shared changes both"
        )
    once = [policy is not Tied.untie and _meant_once(side, policy) for side in touching]
    if all(once):
        return base, _without_copies(adapter, touching)
    if policy is Tied.shared:
        text = (
            f"tied=shared: {touching[0].first.module} was trained for one side; lm_head and embeddings change"
        )
        return replace(base, findings=(*base.findings, Finding(text))), _moved_to(
            embeddings, adapter, touching
        )
    if any(once):
        raise Refused(
            "tied: one adapter trained embeddings and lm_head as one, another only one of them; merge them "
            "one after the other, or set tied=untie or tied=shared"
        )
    untied = _untied(base, embeddings, head)
    return untied, _with_both_sides(adapter, touching, embeddings, untied)


@dataclass(frozen=True)
class _Sides:
    """What one adapter holds for each side of the shared tensor."""

    part: Part
    on_embeddings: list[Delta]
    on_head: list[Delta]

    @property
    def first(self) -> Delta:
        return (self.on_embeddings or self.on_head)[0]


def _sides(part: Part, embeddings: Weight) -> _Sides:
    layer = embeddings.name.split(".")[-2]
    weights = [delta for delta in part.deltas if delta.parameter == "weight"]
    return _Sides(part, [d for d in weights if _last(d) == layer], [d for d in weights if _is_head(d.module)])


def _meant_once(side: _Sides, policy: Tied) -> bool:
    """Whether what the adapter holds is one change of the shared tensor."""
    on_embeddings, on_head = side.on_embeddings, side.on_head
    ensured = bool(side.part.config.get("ensure_weight_tying"))
    if any(isinstance(d, Dora) for d in (*on_embeddings, *on_head)):
        return False  # a magnitude for each column is not one for each row
    if on_head:
        same = len(on_head) == len(on_embeddings) and all(
            _is_copy(h, e) for h, e in zip(on_head, on_embeddings, strict=True)
        )
        if ensured and on_embeddings and not same and policy is Tied.auto:
            raise Refused(
                "tied: the adapter's ensure_weight_tying says that embeddings and lm_head are one, "
                f"but what it holds for {on_head[0].module} differs from {on_embeddings[0].module}; "
                "tied=untie merges each with its own"
            )
        return same and (ensured or all(isinstance(d, Saved | TokenRows) for d in on_head))
    before = _before_training(on_embeddings, side.part)
    return ensured or all(isinstance(d, TokenRows) for d in on_embeddings if d not in before)


def _before_training(deltas: Sequence[Delta], part: Part) -> list[Saved]:
    """The shared tensor itself, resized or not, which PEFT saves beside what was trained of it."""
    return [d for d in deltas if isinstance(d, Saved) and not _is_module_to_save(d, part)]


def _is_module_to_save(delta: Delta, part: Part) -> bool:
    return any(delta.module.endswith(m) for m in part.config.get("modules_to_save") or [])


def _is_copy(head: Delta, embeddings: Delta) -> bool:
    if isinstance(head, Saved) and isinstance(embeddings, Saved):
        return same_values(head.entry, embeddings.entry)
    if isinstance(head, TokenRows) and isinstance(embeddings, TokenRows):
        return head.indices == embeddings.indices and same_values(head.entry, embeddings.entry)
    if not isinstance(head, Lora) or not isinstance(embeddings, Lora):
        return False
    return (
        head.scale == embeddings.scale
        and is_transpose(head.A, embeddings.B)
        and is_transpose(head.B, embeddings.A)
    )


def _moved_to(embeddings: Weight, adapter: Adapter, sides: Sequence[_Sides]) -> Adapter:
    """The adapter whose deltas on lm_head go into the shared tensor, of which one copy is enough."""
    module = embeddings.name.removesuffix(".weight")
    heads = {id(delta) for side in sides for delta in side.on_head}
    whole = [d for side in sides for d in side.on_embeddings if isinstance(d, Saved)]
    copies = {
        id(delta)
        for side in sides
        for delta in _before_training(side.on_head, side.part)
        if any(same_values(delta.entry, other.entry) for other in whole)
    }

    def moved(delta: Delta) -> Delta:
        return replace(delta, module=module) if id(delta) in heads else delta

    def kept(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
        return tuple(moved(delta) for delta in deltas if id(delta) not in copies)

    return Adapter(tuple(replace(part, deltas=kept(part.deltas)) for part in adapter.parts))


def _without_copies(adapter: Adapter, sides: Sequence[_Sides]) -> Adapter:
    heads = [delta for side in sides for delta in side.on_head]
    if not heads:
        return adapter
    found = Finding(f"{heads[0].module} holds a copy of what the embeddings hold; it is used once, for both")
    copies = {id(delta) for delta in heads}
    parts = [replace(p, deltas=tuple(d for d in p.deltas if id(d) not in copies)) for p in adapter.parts]
    return Adapter((replace(parts[0], findings=(*parts[0].findings, found)), *parts[1:]))


def _untied(base: Checkpoint[Weight], embeddings: Weight, head: Weight | None) -> Checkpoint[Weight]:
    """The checkpoint with an lm_head of its own, which starts as the embeddings' very values."""
    name = head.name if head else _head_name(embeddings, base.config.model_type)
    own = replace(embeddings, name=name)
    weights = [own if weight is head else weight for weight in base.weights]
    text = f"the adapter changes embeddings that lm_head shares; {name} is written and {KEY} becomes false"
    return replace(
        _says_untied(base),
        weights=tuple(weights if head else [*weights, own]),
        findings=(*base.findings, Finding(text)),
    )


def _with_both_sides(
    adapter: Adapter, sides: Sequence[_Sides], embeddings: Weight, untied: Checkpoint[Weight]
) -> Adapter:
    """The adapter that holds the shared tensor for both sides, where it has one that is not the base's."""
    head = _head(untied)
    assert head is not None
    modules = [weight.name.removesuffix(".weight") for weight in (embeddings, head)]
    added: dict[int, list[Delta]] = {}
    for side in sides:
        both = (side.on_embeddings, side.on_head)
        for mine, other, module in (*zip(both, both[::-1], modules[::-1], strict=True),):
            found = _before_training(mine, side.part)
            known = embeddings.source and found and same_values(found[0].entry, embeddings.source)
            if found and not known and not any(isinstance(d, Saved) for d in other):
                added.setdefault(id(side.part), []).append(replace(found[0], module=module))
    return Adapter(tuple(replace(p, deltas=(*added.get(id(p), ()), *p.deltas)) for p in adapter.parts))


def _says_untied(base: Checkpoint[Weight]) -> Checkpoint[Weight]:
    return replace(base, config_edits={**base.config_edits, KEY: False})


def _embeddings(base: Checkpoint[Weight]) -> Weight | None:
    """The one weight of token embeddings, if the names show it."""
    for layer in EMBEDDINGS:
        found = [w for w in base.weights if w.name.endswith(f"{layer}.weight") and len(w.shape) == 2]
        if len(found) == 1:
            return found[0]
    return None


def _head(base: Checkpoint[Weight]) -> Weight | None:
    named = ((w, *w.name.rpartition(".")[::2]) for w in base.weights)
    return next((w for w, module, parameter in named if parameter == "weight" and _is_head(module)), None)


def _is_head(module: str) -> bool:
    return module == _WHISPER or module.rpartition(".")[2] in HEADS


def _head_name(embeddings: Weight, model_type: str | None) -> str:
    """language_model.lm_head where the file's language model stands under that name, else lm_head."""
    if model_type == "whisper":
        return f"{_WHISPER}.weight"
    old_prefix = embeddings.name.startswith("language_model.model.")
    return "language_model.lm_head.weight" if old_prefix else "lm_head.weight"


def _last(delta: Delta) -> str:
    return delta.module.rpartition(".")[2]
