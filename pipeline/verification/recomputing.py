"""The weights of an output against a float64 recomputation: rows of every weight that was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from pipeline.ground.folder import Rows
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.reference import Facts, Part, compare, every_row, sampled_rows
from pipeline.ground.report import Action, Gate, PlannedWeight, Status
from pipeline.ground.rounding import Rounding, round_to
from pipeline.ground.written import Standard, Written, standard_of
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.output.stream import num_workers
from pipeline.verification.retracing import Retraced, Traced, retraced
from pipeline.weight import Adapter, Checkpoint, Output, Weight

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
    output: Output,
    base: Checkpoint[Weight],
    adapter: Adapter,
    every: bool = False,
    watching: Watching | None = None,
) -> tuple[Gate, dict[str, Facts]]:
    """Samples, or every row, of every merged weight of the folder against base + delta in float64.

    What base and delta are is worked out from the adapters' files anew; the gate is on whether that comes
    to the same weights as the merge did.
    """
    keep_freed_memory()
    folder, found = Written(output.folder), {}
    planned = {w.name: w for w in output.plan.weights}
    title = f"recomputing {'every row' if every else 'samples'}"
    with ExitStack() as opened, plain_arithmetic():
        anew = opened.enter_context(retraced(output, base, adapter))
        traced = anew.weights
        merged = [w for w in output.merged.weights if isinstance(w, Merged) and _is_traced(w, traced)]
        bar = opened.enter_context(Progress(title, sum(planned[w.name].num_bytes for w in merged)))

        def task(weight: Merged) -> tuple[Merged, Facts]:
            with _held(output, folder, weight, planned[weight.name]) as held:
                watch = watching(weight) if watching else None
                return weight, _facts(weight, held, traced[weight.name], held.looked_at(every), watch)

        tasks = (partial(task, weight) for weight in merged)
        done = opened.enter_context(in_order(tasks, num_workers(), num_workers()))
        for weight, facts in done:
            found[weight.name] = facts
            bar.advance(planned[weight.name].num_bytes)
        return _agreement(output, folder, anew), found


def _facts(
    weight: Merged, held: _Held, traced: Traced, ranges: list[tuple[int, int]], watch: Watch | None
) -> Facts:
    facts, num_parts = Facts(), num_matrices(weight)
    with traced.open() as terms:
        for start, stop in ranges:
            base, delta, size = terms(start, stop)
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


def _is_traced(weight: Weight, traced: Mapping[str, Traced]) -> bool:
    own = traced.get(weight.name)
    return own is not None and bool(own.pieces) and own.shape == weight.shape


def _agreement(output: Output, folder: Written, anew: Retraced) -> Gate:
    """Whether merge and second map change the same weights, and hold the same ones whole."""
    planned = {w.name: w for w in output.plan.weights}
    wanted = "the weights that the adapter's keys mean, read a second time"
    if output.merged.merging is None:
        return Gate("retraced", Status.skipped, "the merge stage does not tell what it was asked", wanted)
    traced, beyond = anew.weights, sorted(anew.weights.keys() - planned)
    wrong = [f"no weight answers to the adapter's {module}" for module in anew.homeless]
    wrong += [f"{name} is not in the output, but the adapter changes it" for name in beyond]
    for weight in output.merged.weights:
        own = traced.get(weight.name)
        changed, held = isinstance(weight, Merged), isinstance(weight, FromAdapter)
        if not own and (changed or held):
            wrong.append(f"{weight.name} is changed, but no tensor of the adapter means it")
        elif own and own.pieces and not changed:
            wrong.append(f"{weight.name} is not changed, but tensors of the adapter mean it")
        elif own and not own.pieces and not held:
            wrong.append(f"{weight.name} is not taken from the adapter, which holds it")
        elif own and own.shape != weight.shape:
            wrong.append(
                f"{weight.name} is {list(weight.shape)}, where the adapter makes it {list(own.shape)}"
            )
        elif own and held:
            with _held(output, folder, weight, planned[weight.name]) as there, own.before() as rows:
                ranges = there.looked_at(False)
                if not all(_is_converted(there, rows(start, stop), start) for start, stop in ranges):
                    wrong.append(f"{weight.name} is not what the adapter holds")
    if wrong:
        return Gate("retraced", Status.failed, f"{wrong[0]} ({len(wrong)} in all)", wanted)
    return Gate("retraced", Status.passed, f"{len(traced)} weights", wanted)


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
