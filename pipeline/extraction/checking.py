"""What an adapter really holds of a fine-tune: both differences read again and set against each other.

The adapter's side is what a merge would add to each weight of the base, by the code that merges; it knows
nothing of how the factors were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

from pipeline.extraction.pairs import Pair, Rows, paired
from pipeline.extraction.result import Extraction
from pipeline.ground.parallel import in_order, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.report import Gate, Status
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.output.stream import num_workers
from pipeline.weight import Checkpoint, Tiles, Weight

SLACK = 1e-3  # of a difference's energy: what rounding factors to 16 bits may cost


@dataclass
class Held:
    """Of one weight of the base."""

    energy: float = 0.0  # ||D||^2, D = tuned - base
    missed: float = 0.0  # ||D - D'||^2, D' what the adapter adds
    elements: int = 0

    @property
    def captured(self) -> float:
        """1 - ||D - D'||^2 / ||D||^2."""
        return 1 - self.missed / self.energy if self.energy else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"energy": self.energy, "captured": self.captured, "residual": sqrt(max(1 - self.captured, 0))}


def held(extraction: Extraction, merged: Checkpoint[Weight]) -> dict[str, Held]:
    """For each weight that changed, what of its change the adapter holds."""
    weights = {weight.name: weight for weight in merged.weights}
    pairs = [p for p in paired(extraction.base, extraction.tuned) if p.base is not p.tuned]
    found = {pair.name: Held() for pair in pairs}
    total = sum(p.tuned.num_rows * p.tuned.num_columns * 4 for p in pairs)
    with (
        ExitStack() as opened,
        plain_arithmetic(),
        Progress("checking what is held", total) as bar,
        in_order(_tasks(pairs, weights, opened), num_workers(), num_workers() + 4) as done,
    ):
        for result in done:
            if callable(result):
                result()
                continue
            name, energy, missed, elements = result
            found[name].energy += energy
            found[name].missed += missed
            bar.advance(elements * 4)
    return {name: one for name, one in found.items() if one.energy}


_Sums = tuple[str, float, float, int]


def _tasks(
    pairs: list[Pair], weights: Mapping[str, Weight], opened: ExitStack
) -> Iterator[Callable[[], _Sums | Callable[[], None]]]:
    for pair in pairs:
        weight = weights.get(pair.name, pair.base)
        own = opened.enter_context(ExitStack())
        rows, tiles = own.enter_context(pair.open("cpu")), own.enter_context(weight.open("cpu"))
        common = min(pair.base.num_rows, pair.tuned.num_rows)
        for start, stop in pair.grid(0, common):
            yield partial(_tile, pair, weight, rows, tiles, start, min(stop, common))
        yield partial(_then, own.close)


def _then(action: Callable[[], None]) -> Callable[[], None]:
    return action


def _tile(pair: Pair, weight: Weight, rows: Rows, tiles: Tiles, start: int, stop: int) -> _Sums:
    _, tuned, D = rows(start, stop)
    left = D
    if isinstance(weight, FromAdapter):
        left = tuned.float() - tiles(start, stop).value.float()
    elif isinstance(weight, Merged):
        added = tiles(start, stop).delta
        assert added is not None
        left = D - added.float()
    energy, missed = (float(x.flatten().double().dot(x.flatten().double())) for x in (D, left))
    return pair.name, energy, missed, D.numel()


def recomputed(extraction: Extraction, found: Mapping[str, Held]) -> Gate:
    """Every parameter of low rank holds what the extraction says, and what is saved whole is exact."""
    wrong = []
    for p in extraction.chosen.lora:
        claimed = extraction.facts[p.name]["captured"]
        parts = [found[pair.name] for pair in p.pairs if pair.name in found]
        energy = sum(h.energy for h in parts)
        if energy and 1 - sum(h.missed for h in parts) / energy < claimed - SLACK:
            wrong.append(p.name)
    whole = {pair.name for p in (*extraction.chosen.saved, *extraction.chosen.biases) for pair in p.pairs}
    wrong += [name for name in whole if name in found and found[name].missed > 1e-12 * found[name].energy]
    total, missed = sum(h.energy for h in found.values()), sum(h.missed for h in found.values())
    seen = f"{1 - missed / total:.4%} of the difference in {len(found)} weights"
    if wrong:
        return Gate("held", Status.failed, f"{wrong[0]} is not ({len(wrong)} parameters)", "as extracted")
    return Gate("held", Status.passed, seen, "as extracted, recomputed from the files")
