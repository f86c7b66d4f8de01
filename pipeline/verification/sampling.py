"""Rows of an output's weights looked at for what is wrong with them: base, delta, and what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from pipeline.ground.causes import look
from pipeline.ground.codes.encoders.encoder import Encoder
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.diagnosis import Codes, Reading, Sample
from pipeline.ground.factors import Scaling
from pipeline.ground.parallel import in_order, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.reference import size_of_terms
from pipeline.ground.written import Standard, Written, standard_of
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.output.stream import num_workers
from pipeline.simulated import Simulated
from pipeline.verification.recomputing import by_chance
from pipeline.weight import Checkpoint, Dense, Output, Weight

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS = 1 << 15  # looked at in each weight
_MOST = 512  # weights looked at
_BLOCK = 64  # of NF4, as bitsandbytes has it
_EXPERTS = 64  # experts of a fused weight looked at
_FLOATS = ("F64", "F32", "BF16", "F16")
_Standard = Callable[[], AbstractContextManager[Standard]]


def looked_at(output: Output, base: Checkpoint[Weight], folder: Written) -> list[Reading]:
    """What each weight shows; the same rows of those that differ in a number alone, to tell them apart."""
    bases = {weight.name: weight for weight in base.weights}
    forms = _forms(output, folder)
    weights = [w for w in output.merged.weights if w.name in forms and w.num_rows and w.num_columns]
    weights = [w for w in weights if not isinstance(w, FromAdapter) or _has_before(w, bases)]
    changed = [w for w in weights if isinstance(w, Merged | FromAdapter)]
    others = [w for w in weights if not isinstance(w, Merged | FromAdapter)]
    chosen = [(w, bases.get(w.name, w)) for w in (*_ends(changed), *_ends(others))]

    def task(weight: Weight, before: Weight) -> list[Reading]:
        return [look(s) for s in _of(weight, before, output, folder, forms[weight.name])]

    readings = list[Reading]()
    tasks = (partial(task, *pair) for pair in chosen)
    with (
        Progress("looking for the cause", len(chosen), "weights") as bar,
        plain_arithmetic(),
        in_order(tasks, num_workers(), num_workers()) as done,
    ):
        for seen in done:
            readings += seen
            bar.advance(1)
    return readings


def _has_before(weight: Weight, bases: Mapping[str, Weight]) -> bool:
    return weight.name in bases and bases[weight.name].shape == weight.shape


def _forms(output: Output, folder: Written) -> dict[str, str | Encoder]:
    """The weights that can be looked at: of which dtype they are, or the encoder of their codes."""
    facts = {name: (dtype, shape) for name, dtype, shape in folder.facts()}
    found: dict[str, str | Encoder] = {}
    for weight in output.plan.weights:
        dtype, shape = facts.get(weight.name, ("", ()))
        if weight.encoder and weight.name in folder.codes:
            found[weight.name] = weight.encoder
        elif dtype in _FLOATS and shape == weight.shape:
            found[weight.name] = dtype
    return found


def _ends(weights: Sequence[Weight]) -> Sequence[Weight]:
    half = _MOST // 2
    return weights if len(weights) <= _MOST else [*weights[:half], *weights[-half:]]


def _of(
    weight: Weight, before: Weight, output: Output, folder: Written, form: str | Encoder
) -> Iterator[Sample]:
    wide = replace(weight, arithmetic="F64") if isinstance(weight, Merged) else weight
    chance, encoder = weight.name in by_chance(output), form if isinstance(form, Encoder) else None
    with ExitStack() as stack:
        tiles, bases = (stack.enter_context(w.open("cpu")) for w in (wide, before))
        held = stack.enter_context(folder.opened(weight.name))
        standard = partial(standard_of, encoder, folder.codes[weight.name], chance) if encoder else None
        for name, start, stop in _places(weight, encoder.grain if encoder else 1):
            tile = tiles(start, stop)
            if isinstance(weight, FromAdapter):
                W = bases(start, stop).value.double()
                delta = tile.value.double() - W
            else:
                W = tile.base.double()
                delta = tile.value.double() - W if isinstance(weight, Merged) else None
            stored = held(start, stop).double().view(W.shape)
            yield Sample(
                name,
                W,
                delta,
                stored,
                form if isinstance(form, str) else form.describe,
                _scaling(weight, output),
                stop - start == weight.num_rows,
                _codes(standard, W if delta is None else W + delta, stored, start) if standard else None,
                _four_bit(before, start, stop),
                _apart(wide, start, stop),
            )


def _codes(standard: _Standard, target: Tensor, stored: Tensor, start: int) -> Codes:
    """The format of the rows from `start`, to ask it what it makes of other values."""

    def are(base: Tensor, delta: Tensor) -> Tensor:
        values, terms = base + delta, base.abs() + size_of_terms(base, delta)
        with standard() as known:
            return (stored - values).abs() <= known.allowed(values, terms, start)

    def nearest(values: Tensor) -> Tensor:
        with standard() as known:
            return known.nearest(values, start)

    return Codes(are, nearest, float((nearest(target) - target).square().sum()))


def _four_bit(base: Weight, start: int, stop: int) -> tuple[Callable[[], Tensor], ...]:
    """Rows of a base of plain numbers as bitsandbytes loads them in NF4, scales plain and nested."""
    if not isinstance(base, Dense) or any(row * base.num_columns % _BLOCK for row in (start, stop)):
        return ()

    def form(nested: bool) -> Tensor:
        simulated = Simulated(base.name, base.shape, base.dtype, base, "nf4", _BLOCK, nested)
        with simulated.open("cpu") as tiles:
            return tiles(start, stop).value.double()

    return partial(form, False), partial(form, True)


def _apart(weight: Weight, start: int, stop: int) -> Mapping[int, Callable[[], Tensor]]:
    """By adapter, what it adds to the rows; {} for one alone, or where one gives a value."""
    if not isinstance(weight, Merged) or len(weight.parts) < 2:
        return {}
    if any(placed.delta.replaces for placed in weight.placed):
        return {}

    def delta(of_one: Merged) -> Tensor:
        with of_one.open("cpu") as tiles:
            tile = tiles(start, stop)
        return tile.value.double() - tile.base.double()

    parts = weight.parts.items()
    return {number: partial(delta, replace(weight, placed=tuple(placed))) for number, placed in parts}


def _places(weight: Weight, grain: int) -> list[tuple[str, int, int]]:
    """Rows to look at: the middle of a matrix, the first rows of each expert of a fused weight."""
    grain, rows = lcm(weight.grain, grain), weight.num_rows
    if len(weight.shape) == 3 and weight.shape[1] % grain == 0:
        each = weight.shape[1]
        count = min(max(_ELEMENTS // 4 // weight.num_columns // grain, 1) * grain, each)
        return [(f"{weight.name}[{e}]", e * each, e * each + count) for e in range(weight.shape[0])][
            :_EXPERTS
        ]
    count = min(max(_ELEMENTS // weight.num_columns // grain, 1) * grain, rows)
    start = (rows - count) // 2 // grain * grain
    return [(weight.name, start, min(start + count, rows))]


def _scaling(weight: Weight, output: Output) -> Scaling | None:
    """What the scale of a weight with one plain LoRA is made of."""
    if not isinstance(weight, Merged) or len(weight.placed) != 1:
        return None
    placed = weight.placed[0]
    config = output.adapter.parts[placed.part].config
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(placed.delta, Lora) or not isinstance(alpha, int | float) or not isinstance(rank, int):
        return None
    stabilised, own = bool(config.get("use_rslora")), placed.delta
    told = own.scale * (own.rank**0.5 if stabilised else own.rank)
    return Scaling(told, own.rank, stabilised, float(alpha), rank) if told and alpha and rank else None
