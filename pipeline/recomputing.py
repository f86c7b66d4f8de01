"""The weights of an output against a float64 recomputation: rows of every weight that was computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING

from pipeline.combined import Combined
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.progress import Progress
from pipeline.ground.reference import Facts, Reference, compare, factor_name, sampled_rows, size_of_terms
from pipeline.ground.report import Action, Gate, PlannedWeight, Status
from pipeline.ground.rounding import Rounding, round_to
from pipeline.ground.written import Standard, Written, standard_of
from pipeline.pieces import Merged, Placed
from pipeline.weight import Adapter, Output, Weight

if TYPE_CHECKING:
    from torch import Tensor

_AS_NEAR = "half a unit and the slack of a float32 sum"


@dataclass(frozen=True)
class _Held:
    """How one weight of the output is held, and what it is judged by."""

    folder: Written
    weight: Weight
    plan: PlannedWeight
    by_chance: bool
    codes: Standard | None

    @property
    def samples(self) -> list[tuple[int, int]]:
        weight, grain = self.weight, self.codes.encoder.grain if self.codes else 1
        return sampled_rows(weight.name, weight.num_rows, weight.num_columns, lcm(weight.grain, grain))

    def compare(self, facts: Facts, start: int, stop: int, base: Tensor, delta: Tensor, size: Tensor) -> None:
        """Adds the stored rows to the facts, against base + delta."""
        rows = self.folder.rows(self.weight.name, start, stop)
        if self.codes:
            self.codes.compare(facts, rows, start, base, delta, size)
            return
        dtype = self.plan.dtype
        compare(facts, rows, dtype, base, round_to(base, dtype), delta, size, by_chance=self.by_chance)


@contextmanager
def _held(output: Output, folder: Written, weight: Weight, plan: PlannedWeight) -> Iterator[_Held]:
    chance = weight.name in by_chance(output)
    with ExitStack() as stack:
        codes = None
        if plan.encoder and plan.action is not Action.copied:
            code = folder.codes[weight.name]
            codes = stack.enter_context(standard_of(plan.encoder, code, chance))
        yield _Held(folder, weight, plan, chance, codes)


def by_chance(output: Output) -> set[str]:
    """The weights of which the manifest says that they were rounded stochastically."""
    told = output.manifest.get("weights", {}).items()
    return {name for name, w in told if w.get("rounding") == Rounding.stochastic.value}


def recompute(output: Output, adapter: Adapter) -> dict[str, Facts]:
    """Samples of every merged weight of the folder against base + delta in float64."""
    folder, found = Written(output.folder), {}
    merged = [w for w in output.merged.weights if isinstance(w, Merged)]
    planned = {w.name: w for w in output.plan.weights}
    with (
        ExitStack() as opened,
        Progress("recomputing samples", sum(planned[w.name].num_bytes for w in merged)) as bar,
    ):
        references = [
            opened.enter_context(Reference(part.origin.folder, part.config)) for part in adapter.parts
        ]
        for weight in merged:
            bar.advance(planned[weight.name].num_bytes)
            facts = found[weight.name] = Facts()
            plain = all(is_plain(placed, weight) for placed in weight.placed)
            with (
                replace(weight, arithmetic="F64").open("cpu") as tiles,
                weight.base.open("cpu") as bases,
                _held(output, folder, weight, planned[weight.name]) as held,
            ):
                for start, stop in held.samples:
                    if plain:
                        base = bases(start, stop).base
                        delta, size = added(references, weight.placed, start, stop)
                    else:
                        tile = tiles(start, stop)
                        base, delta = tile.base, tile.value - tile.base.double()
                        size = size_of_terms(base, delta)
                    held.compare(facts, start, stop, base, delta, size)
    return found


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
    references: Sequence[Reference], placed: Sequence[Placed], start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Rows of the sum of plain deltas, and of the sizes that their slack is taken of."""
    parts = [references[p.part].delta(p.delta.module, p.factor, start, stop) for p in placed]
    deltas, sizes = zip(*parts, strict=True)
    return sum(deltas[1:], deltas[0]), sum(sizes[1:], sizes[0])


def converted(output: Output) -> Gate:
    """Samples of weights that were decoded, cast or quantized: the base's value, rounded once."""
    folder, wrong, count = Written(output.folder), [], 0
    planned = {w.name: w for w in output.plan.weights}
    for weight in output.merged.weights:
        plan = planned[weight.name]
        if plan.action in (Action.copied, Action.merged):
            continue
        count += 1
        with weight.open("cpu") as tiles, _held(output, folder, weight, plan) as held:
            if not all(_is_converted(held, tiles(start, stop).value, start) for start, stop in held.samples):
                wrong.append(weight.name)
    wanted = "the base's values rounded once"
    if wrong:
        return Gate("converted", Status.failed, f"{wrong[0]} differs ({len(wrong)} weights)", wanted)
    return Gate("converted", Status.passed, f"{count} weights as decoded", wanted)


def _is_converted(held: _Held, value: Tensor, start: int) -> bool:
    rows = held.folder.rows(held.weight.name, start, start + len(value)).view(value.shape)
    if held.codes:
        facts, nothing = Facts(), value.new_zeros(()).double()
        held.codes.compare(facts, rows, start, value, nothing, nothing)
        return not facts.beyond and not facts.is_noisy
    wanted = round_to(value, held.plan.dtype)
    return bool(((rows == wanted) | (rows.isnan() & wanted.isnan())).all())


def rounding(output: Output, facts: dict[str, Facts]) -> Gate:
    """Merged weights as near as their dtype or codes allow; a figure only where arithmetic is narrower."""
    if not facts:
        return Gate("rounding", Status.passed, "no weight is merged", "half a unit in the last place")
    beyond, elements = sum(f.beyond for f in facts.values()), sum(f.elements for f in facts.values())
    numbers = {name: f for name, f in facts.items() if not f.coded}
    coded = len(facts) - len(numbers)
    worst = max(numbers or facts, key=lambda name: (facts[name].worst_ulp, facts[name].beyond))
    seen = f"{elements:,} elements"
    if numbers:
        raw = max(f.worst_raw_ulp for f in numbers.values())
        seen = f"worst {facts[worst].worst_ulp:.4f} ulp beyond the slack ({raw:.2f} with it), {seen}"
    seen += f", codes of {coded} weights among them" if coded else ""
    if not {"float32", "float64"} & set(output.plan.merge_dtype.split(", ")):
        return Gate("rounding", Status.passed, seen, f"reported only: merged in {output.plan.merge_dtype}")
    wanted = _AS_NEAR + ("; the nearest codes, or those that the slack makes as near" if coded else "")
    if by_chance(output):
        wanted += "; a whole unit where it was rounded by chance"
    if beyond:
        worst = max(facts, key=lambda name: (facts[name].beyond > 0, facts[name].worst_ulp))
        seen += f"; {beyond} too far off, the worst in {worst}"
    noisy = [name for name, f in facts.items() if f.is_noisy and name not in by_chance(output)]
    if noisy:
        seen += f"; codes of {noisy[0]} are farther off in sum than they should be ({len(noisy)} weights)"
    return Gate("rounding", Status.failed if beyond or noisy else Status.passed, seen, wanted)
