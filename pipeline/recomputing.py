"""The weights of an output against a float64 recomputation: rows of every weight that was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from pipeline.combined import Combined
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.folder import Rows
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.reference import (
    Facts,
    Part,
    Reference,
    compare,
    every_row,
    factor_name,
    sampled_rows,
    size_of_terms,
)
from pipeline.ground.report import Action, Gate, PlannedWeight, Status
from pipeline.ground.rounding import Rounding, round_to
from pipeline.ground.written import Standard, Written, standard_of
from pipeline.pieces import Merged, Placed
from pipeline.stream import num_workers
from pipeline.weight import Adapter, Output, Weight

if TYPE_CHECKING:
    from torch import Tensor

Watch = Callable[[int, "Tensor", "Tensor", "Tensor"], None]  # of rows start: stored, base, delta in float64
Watching = Callable[[Merged], Watch]


@dataclass(frozen=True)
class _Held:
    """How one weight of the output is held, and what it is judged by."""

    rows: Rows
    weight: Weight
    plan: PlannedWeight
    by_chance: bool
    codes: Standard | None

    def looked_at(self, every: bool) -> list[tuple[int, int]]:
        """Row ranges: all, or samples."""
        weight, grain = self.weight, self.codes.encoder.grain if self.codes else 1
        grain, stack = lcm(weight.grain, grain), num_matrices(weight)
        stack = stack if weight.num_rows // stack % grain == 0 else 1
        if every:
            return every_row(weight.num_rows, weight.num_columns, grain, stack)
        return sampled_rows(weight.name, weight.num_rows, weight.num_columns, grain, stack)

    def compare(
        self, facts: Facts, start: int, rows: Tensor, base: Tensor, delta: Tensor, size: Tensor
    ) -> None:
        """Adds the stored rows to the facts, against base + delta."""
        if self.codes:
            self.codes.compare(facts, rows, start, base, delta, size)
        else:
            compare(facts, rows, self.plan.dtype, base, delta, size, start, self.by_chance)


@contextmanager
def _held(output: Output, folder: Written, weight: Weight, plan: PlannedWeight) -> Iterator[_Held]:
    chance = weight.name in by_chance(output)
    with ExitStack() as stack:
        codes = None
        if plan.encoder:
            code = folder.codes[weight.name]
            codes = stack.enter_context(standard_of(plan.encoder, code, chance))
        yield _Held(stack.enter_context(folder.opened(weight.name)), weight, plan, chance, codes)


def num_matrices(weight: Weight) -> int:
    """How many matrices the weight stacks, experts that an adapter changes; else 1."""
    stacked = isinstance(weight, Merged) and any(placed.delta.stacked for placed in weight.placed)
    return weight.shape[0] if stacked and len(weight.shape) == 3 else 1


def by_chance(output: Output) -> set[str]:
    """The weights of which the manifest says that they were rounded stochastically."""
    told = output.manifest.get("weights", {}).items()
    return {name for name, w in told if w.get("rounding") == Rounding.stochastic.value}


def recompute(
    output: Output, adapter: Adapter, every: bool = False, watching: Watching | None = None
) -> dict[str, Facts]:
    """Samples, or every row, of every merged weight of the folder against base + delta in float64."""
    keep_freed_memory()
    folder, found = Written(output.folder), {}
    merged = [w for w in output.merged.weights if isinstance(w, Merged)]
    planned = {w.name: w for w in output.plan.weights}
    title = f"recomputing {'every row' if every else 'samples'}"
    with (
        ExitStack() as opened,
        plain_arithmetic(),
        Progress(title, sum(planned[w.name].num_bytes for w in merged)) as bar,
    ):
        references = [
            opened.enter_context(Reference(part.origin.folder, part.config)) for part in adapter.parts
        ]

        def task(weight: Merged) -> tuple[Merged, Facts]:
            with _held(output, folder, weight, planned[weight.name]) as held:
                watch = watching(weight) if watching else None
                return weight, _facts(weight, held, references, held.looked_at(every), watch)

        tasks = (partial(task, weight) for weight in merged)
        done = opened.enter_context(in_order(tasks, num_workers(), num_workers()))
        for weight, facts in done:
            found[weight.name] = facts
            bar.advance(planned[weight.name].num_bytes)
    return found


def _facts(
    weight: Merged,
    held: _Held,
    references: Sequence[Reference],
    ranges: list[tuple[int, int]],
    watch: Watch | None,
) -> Facts:
    facts, plain = Facts(), all(is_plain(placed, weight) for placed in weight.placed)
    num_parts = num_matrices(weight)
    with ExitStack() as stack:
        if plain:
            bases = stack.enter_context(weight.base.open("cpu"))
            deltas = added(references, weight.placed)
        else:
            tiles = stack.enter_context(replace(weight, arithmetic="F64").open("cpu"))
        for start, stop in ranges:
            if plain:
                base, (delta, size) = bases(start, stop).base, deltas(start, stop)
            else:
                tile = tiles(start, stop)
                base, delta = tile.base, tile.value - tile.base.double()
                size = size_of_terms(base, delta)
            rows, seen = held.rows(start, stop).view(base.shape), (facts.energy, facts.changed, facts.due)
            held.compare(facts, start, rows, base, delta, size)
            if num_parts > 1:
                part = facts.parts.setdefault(start * num_parts // weight.num_rows, Part())
                part.energy += facts.energy - seen[0]
                part.changed += facts.changed - seen[1]
                part.due += facts.due - seen[2]
            if watch:
                watch(start, rows.double(), base.double(), delta)
    return facts


def is_plain(placed: Placed, weight: Merged) -> bool:
    """Whether it is nothing but B @ A on all of the weight, as its file has it."""
    delta = placed.delta
    if isinstance(weight, Combined):
        return False
    if not isinstance(delta, Lora) or len(delta.A.shape) != 2 or delta.blocks != (1, 1) or delta.transposed:
        return False
    named = [delta.A.name, delta.B.name] == [factor_name(delta.module, x) for x in "AB"]
    return named and delta.shape == weight.shape and placed.rows == (0, weight.num_rows) and delta.scale > 0


def added(
    references: Sequence[Reference], placed: Sequence[Placed]
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """rows(start, stop) of the sum of plain deltas, and of the sizes that their slack is taken of."""
    parts = [references[p.part].delta(p.delta.module, p.factor) for p in placed]

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        deltas, sizes = zip(*(part(start, stop) for part in parts), strict=True)
        return sum(deltas[1:], deltas[0]), sum(sizes[1:], sizes[0])

    return rows


def converted(output: Output, every: bool = False) -> Gate:
    """Samples, or every row, of what was decoded, cast or quantized: the base's values rounded once."""
    planned = {w.name: w.action for w in output.plan.weights}
    asked = [w for w in output.merged.weights if planned[w.name] not in (Action.copied, Action.merged)]
    wrong, wanted = other_values(output, asked, every), "the base's values rounded once"
    if wrong:
        return Gate("converted", Status.failed, f"{wrong[0]} differs ({len(wrong)} weights)", wanted)
    return Gate("converted", Status.passed, f"{len(asked)} weights as decoded", wanted)


def other_values(output: Output, weights: Sequence[Weight], every: bool) -> list[str]:
    """The names of those that are not their own values rounded or encoded once, by samples or every row."""
    keep_freed_memory()
    folder = Written(output.folder)
    planned = {w.name: w for w in output.plan.weights}

    def task(weight: Weight) -> bool:
        with weight.open("cpu") as tiles, _held(output, folder, weight, planned[weight.name]) as held:
            ranges = held.looked_at(every)
            return all(_is_converted(held, tiles(start, stop).value, start) for start, stop in ranges)

    tasks = (partial(task, weight) for weight in weights)
    with plain_arithmetic(), in_order(tasks, num_workers(), num_workers()) as done:
        return [weight.name for weight, right in zip(weights, done, strict=True) if not right]


def _is_converted(held: _Held, value: Tensor, start: int) -> bool:
    rows = held.rows(start, start + len(value)).view(value.shape)
    if held.codes:
        facts, nothing = Facts(), value.new_zeros(()).double()
        held.codes.compare(facts, rows, start, value, nothing, nothing)
        return not facts.beyond and not facts.is_noisy
    wanted = round_to(value, held.plan.dtype)
    return bool(((rows == wanted) | (rows.isnan() & wanted.isnan())).all())
