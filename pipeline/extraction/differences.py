"""The first pass over both checkpoints: which weights differ at all, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import sqrt

from pipeline.extraction.pairs import Pair, Rows
from pipeline.ground.errors import Refused
from pipeline.ground.parallel import in_order, keep_freed_memory, plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.output.stream import num_workers


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one weight."""

    energy: float
    """||D||^2, of the rows that both have"""
    base_energy: float
    """||W||^2"""
    resized: bool = False

    @property
    def changed(self) -> bool:
        return self.energy > 0 or self.resized

    @property
    def relative(self) -> float:
        """||D|| / ||W||."""
        return sqrt(self.energy / self.base_energy) if self.base_energy else float("inf")


def compare(pairs: Iterable[Pair], device: str, key: str = "finetune") -> Mapping[str, Change]:
    """The changes by name; Refused for values that are not finite, and where nothing changed.

    `key` is the recipe's, of which the tuned weights come.
    """
    pairs = list(pairs)
    keep_freed_memory()
    sums: dict[str, list[tuple[float, float]]] = {pair.name: [] for pair in pairs}
    total = sum(p.tuned.num_rows * p.tuned.num_columns * 4 for p in pairs)
    with (
        ExitStack() as opened,
        plain_arithmetic(),
        Progress("comparing", total) as bar,
        in_order(_tasks(pairs, device, key, opened), num_workers(), num_workers() + 4) as done,
    ):
        for result in done:
            if callable(result):
                result()
                continue
            name, energy, base_energy, elements = result
            sums[name].append((energy, base_energy))
            bar.advance(elements * 4)
    found = {
        pair.name: Change(
            sum(e for e, _ in sums[pair.name]), sum(b for _, b in sums[pair.name]), pair.resized
        )
        for pair in pairs
    }
    if not any(change.changed for change in found.values()):
        same = "is the same as the base in every" if key == "finetune" else "changes no"
        raise Refused(f"{key}: {same} weight; there is nothing to extract")
    return found


_Sums = tuple[str, float, float, int]


def _tasks(
    pairs: Iterable[Pair], device: str, key: str, opened: ExitStack
) -> Iterator[Callable[[], _Sums | Callable[[], None]]]:
    for pair in pairs:
        if pair.base is pair.tuned:
            continue
        weight = opened.enter_context(ExitStack())
        rows = weight.enter_context(pair.open(device))
        common = min(pair.base.num_rows, pair.tuned.num_rows)
        for start, stop in pair.grid(0, common):
            yield partial(_tile, pair, rows, key, start, min(stop, common))
        yield partial(_then, weight.close)


def _then(action: Callable[[], None]) -> Callable[[], None]:
    return action


def _tile(pair: Pair, rows: Rows, key: str, start: int, stop: int) -> _Sums:
    base, tuned, D = rows(start, stop)
    W = base.float()
    energy, base_energy = float(D.flatten().dot(D.flatten())), float(W.flatten().dot(W.flatten()))
    if not (energy < float("inf") and base_energy < float("inf")):
        which = "base_model" if not bool(W.isfinite().all()) else key
        if which == key and bool(tuned.isfinite().all()):
            energy, base_energy = float(D.double().square().sum()), float(W.double().square().sum())
        else:
            raise Refused(f"{which}: {pair.name} holds values that are not finite; it cannot be compared")
    return pair.name, energy, base_energy, D.numel()
