"""Models compared by their logits, in the form that fits into memory: whole, or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, Protocol

from pipeline.ground import logits
from pipeline.ground.device import memory_free, resolve_device
from pipeline.ground.errors import Refused
from pipeline.ground.gates import Limits
from pipeline.ground.layerwise import Layers
from pipeline.ground.manifest import peak_memory
from pipeline.ground.predicting import DoesNotFit, Form, InMemory, Load
from pipeline.ground.texts import sample
from pipeline.ground.units import show_bytes
from pipeline.ground.unread import Stream
from pipeline.verification.deferring import Deferred
from pipeline.verification.whole import Whole
from pipeline.weight import Adapter, Checkpoint, Output, Weight

_HELD = 4 << 30  # bytes of log-probabilities at once


class Layerwise(Enum):
    """When models are run one layer at a time."""

    auto = "auto"
    always = "always"
    never = "never"


@dataclass(frozen=True)
class Asked:
    """What a recipe asks of the answers."""

    tokens: int
    text: str | None
    prompts: tuple[str, ...]
    limits: Limits
    device: str
    memory_limit: int | None = None
    layerwise: Layerwise = Layerwise.auto


class Skipped(Exception):  # noqa: N818  it reads like what happened
    """Why nothing is compared: for the gate, and as a finding."""

    def __init__(self, seen: str, finding: str) -> None:
        self.seen, self.finding = seen, finding


class Loaders(Protocol):
    """How to get models in one of the forms."""

    def base(self, base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> Load: ...

    def folder(self, output: Output) -> Load: ...


def read_text(path: str) -> str:
    """The text of a file; Refused where it cannot be read."""
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # ~nobody
        raise Refused(f"verify.text: '{path}' cannot be read as text ({error})") from None
    if not text.strip():
        raise Refused(f"verify.text: '{path}' is empty; give a file of text")
    return text


def read_prompts(value: Any) -> tuple[str, ...]:
    """verify.prompts as a recipe may write it: nothing, one prompt, or a list of them."""
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(p, str) and p.strip() for p in found):
        raise Refused(f"verify.prompts: {value!r} is neither a text nor a list of texts")
    return tuple(found)


def compared(
    models: Callable[[Loaders], logits.Models],
    largest: int,
    vocabulary: int,
    asked: Asked,
    prompts: Sequence[str] = (),
) -> logits.Outcome:
    """Runs the models, whole or layer by layer; Skipped where there is no memory for either.

    One model at a time is run: `largest` is the number of parameters, trained ones included, of the one that
    has most, `vocabulary` the most classes that any predicts.
    """
    at_once = _round(vocabulary, asked.tokens)
    loaders, form = _form(logits.memory_needed(largest, vocabulary, at_once), asked)
    try:
        outcome = _in_rounds(models(loaders), asked, at_once, form, prompts)
    except DoesNotFit as reason:
        raise Skipped("not enough memory", f": {reason}") from None
    outcome.figures["peak_memory"] = peak_memory()
    return outcome


def _form(needed: int, asked: Asked) -> tuple[Loaders, Form]:
    """How models are got and run that take so many bytes, if they are in memory whole."""
    wanted = device = resolve_device(asked.device)
    if device != "cpu" and needed > memory_free(device):
        device = "cpu"
    free = asked.memory_limit or memory_free(device)
    if asked.layerwise is Layerwise.always or (needed > free and asked.layerwise is Layerwise.auto):
        stream = Stream()
        return Deferred(stream), Layers(stream, asked.memory_limit or memory_free(wanted), wanted)
    if needed > free:
        raise Skipped(
            "not enough memory",
            f": that takes {show_bytes(needed)} of memory, {show_bytes(free)} are free; "
            "verify.layerwise=auto reads one layer at a time",
        )
    return Whole(), InMemory(device)


def _round(vocabulary: int, tokens: int) -> int:
    """Tokens whose log-probabilities are held at once: one load of the models serves so many."""
    sets = logits.memory_needed(0, vocabulary, logits.SEQUENCE)
    return min(tokens, max(_HELD // sets, 1) * logits.SEQUENCE)


def _in_rounds(
    models: logits.Models, asked: Asked, at_once: int, form: Form, prompts: Sequence[str]
) -> logits.Outcome:
    """The outcome over all tokens; the models are loaded anew for each stretch of them."""
    text = sample(asked.tokens) if asked.text is None else read_text(asked.text)
    outcomes: list[logits.Outcome] = []
    for first in range(0, asked.tokens, at_once):
        count, said = min(at_once, asked.tokens - first), () if first else prompts
        try:
            outcomes.append(logits.compare(models, text, count, said, form, first))
        except logits.TextEnds:
            break
    return logits.together(outcomes)


def num_parameters(weights: Iterable[Weight]) -> int:
    """Elements of all."""
    return sum(prod(weight.shape) for weight in weights)


def num_trained(adapter: Adapter) -> int:
    """Elements that an adapter puts beside a base's; those that modules share are counted once."""
    held = {entry: prod(entry.shape) for delta in adapter.deltas for entry in delta.entries}
    return sum(held.values())


def num_classes(weights: Iterable[Weight]) -> int:
    """Of what is predicted, at most: rows of a matrix."""
    return max((prod(weight.shape[:1]) for weight in weights if len(weight.shape) == 2), default=1)
