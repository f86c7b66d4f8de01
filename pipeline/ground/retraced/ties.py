"""Embeddings that lm_head shares: which side an adapter's tensors are meant for, and whether they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from pipeline.ground.formulas import values
from pipeline.ground.retraced.adapter import Adapter
from pipeline.ground.retraced.keys import Trained

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_HEADS = ("lm_head", "embed_out")
_TWINS = {"lora_A": "lora_embedding_B", "lora_B": "lora_embedding_A"}  # each other's transposes

Shapes = Mapping[str, tuple[int, ...]]
IsBase = Callable[[Adapter, str], bool]  # whether a tensor of the adapter is what the base's embeddings are


@dataclass(frozen=True)
class Tie:
    """The weight of the embeddings, and the head's own if the file has one."""

    embeddings: str
    head: str | None

    @property
    def module(self) -> str:
        return self.embeddings.removesuffix(".weight")

    def side(self, one: Trained) -> str | None:
        """Which side it is meant for: embeddings or head."""
        if one.parameter != "weight":
            return None
        if is_head(f"{one.module}.weight"):
            return "head"
        return "embeddings" if one.module.split(".")[-1] == self.module.split(".")[-1] else None


def is_head(name: str) -> bool:
    """Whether it is the weight of an output layer; Whisper's stands on top."""
    words = name.split(".")
    return name == "proj_out.weight" or (words[-1] == "weight" and words[-2:][0] in _HEADS)


def tie_of(shapes: Shapes, tied: bool | None) -> Tie | None:
    """The tie of a checkpoint whose config says `tied`; None where its sides are two, or not to be told."""
    head = next((name for name in shapes if is_head(name)), None)
    if tied is False or (tied is None and head):
        return None
    for layer in _EMBEDDINGS:
        named = [name for name, s in shapes.items() if name.endswith(f"{layer}.weight") and len(s) == 2]
        if len(named) == 1:
            return Tie(named[0], head)
    return None


def settle(
    adapters: Sequence[Adapter], tie: Tie, policy: str, own_head: str | None, is_base: IsBase
) -> tuple[list[Adapter], bool]:
    """The adapters with each of their tensors on one side, and whether the sides part.

    `own_head` is the weight that the output has for it.
    """
    touching = [a for a in adapters if any(tie.side(one) for one in a.trained)]
    once = [policy != "untie" and _is_one(a, tie, policy) for a in touching]
    if not touching:
        return [*adapters], False
    if all(once):
        return [_dropping(a, [o for o in a.trained if tie.side(o) == "head"]) for a in adapters], False
    if policy == "shared":
        return [_moved(a, tie) for a in adapters], False
    return [_on_both(a, tie, own_head or "lm_head.weight", is_base) for a in adapters], True


def _is_one(adapter: Adapter, tie: Tie, policy: str) -> bool:
    """Whether its tensors are one change of both sides."""
    on = {s: [o for o in adapter.trained if tie.side(o) == s] for s in ("embeddings", "head")}
    every, ensured = [*on["embeddings"], *on["head"]], bool(adapter.config.get("ensure_weight_tying"))
    if any("lora_magnitude_vector" in one.keys for one in every):
        return False
    if on["head"]:
        copies = all(h and e and _same(adapter, h, e) for h, e in zip_longest(on["head"], on["embeddings"]))
        by_value = all(one.formula in (values.saved, values.tokens) for one in on["head"])
        return copies and (ensured or by_value)
    trained = [one for one in on["embeddings"] if not _is_left(adapter, one)]
    return ensured or all(one.formula is values.tokens for one in trained)


def _is_left(adapter: Adapter, one: Trained) -> bool:
    """Whether it is the embeddings as they were, resized or not, which PEFT saves along."""
    return one.is_saved and not one.module.endswith(tuple(adapter.config.get("modules_to_save") or ()))


def _same(adapter: Adapter, head: Trained, embeddings: Trained) -> bool:
    if head.formula is embeddings.formula:
        pairs = [(head.keys[name], embeddings.keys[name], False) for name in head.keys]
    elif set(head.keys) == set(_TWINS) and set(embeddings.keys) == set(_TWINS.values()):
        pairs = [(head.keys[one], embeddings.keys[other], True) for one, other in _TWINS.items()]
    else:
        return False
    return all(equal(adapter, one, other, turned) for one, other, turned in pairs)


def equal(adapter: Adapter, one: str, other: str, turned: bool = False) -> bool:
    """Whether two tensors of its file hold the same values."""
    a, b = adapter.file.get_tensor(one), adapter.file.get_tensor(other)
    b = b.T if turned else b
    return a.shape == b.shape and bool((a == b).all())


def _dropping(adapter: Adapter, some: Sequence[Trained]) -> Adapter:
    return replace(adapter, trained=[one for one in adapter.trained if one not in some])


def _moved(adapter: Adapter, tie: Tie) -> Adapter:
    """With what is meant for the head on the embeddings, the saved copy of what they were but once."""
    on_embeddings = [o for o in adapter.trained if tie.side(o) == "embeddings" and o.is_saved]
    on_head = [o for o in adapter.trained if tie.side(o) == "head"]
    copies = [
        one
        for one in on_head
        if _is_left(adapter, one) and any(equal(adapter, one.keys[""], o.keys[""]) for o in on_embeddings)
    ]
    rest = _dropping(adapter, copies)
    return replace(rest, trained=[replace(o, module=tie.module) if o in on_head else o for o in rest.trained])


def _on_both(adapter: Adapter, tie: Tie, head: str, is_base: IsBase) -> Adapter:
    """With the embeddings that it was trained on for either side, where they are not the base's."""
    sides = {"embeddings": tie.module, "head": head.removesuffix(".weight")}
    added = []
    for side, other in (("embeddings", "head"), ("head", "embeddings")):
        left = [o for o in adapter.trained if tie.side(o) == side and _is_left(adapter, o)]
        if not left or any(o.is_saved and tie.side(o) == other for o in adapter.trained):
            continue
        if not is_base(adapter, left[0].keys[""]):
            added.append(replace(left[0], module=sides[other]))
    return replace(adapter, trained=[*added, *adapter.trained])
