"""An extraction: what of a fine-tune an adapter holds, before it is made and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.extraction.choice import Chosen
from pipeline.extraction.decomposing import Decomposed
from pipeline.extraction.outputs import in_outputs
from pipeline.extraction.parameters import Parameter
from pipeline.extraction.rule import Rule
from pipeline.extraction.tensors import num_parameters, saved_bytes
from pipeline.ground.deltas.delta import Base, Delta, RowsOf
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.dtypes import num_bytes
from pipeline.ground.errors import Refused
from pipeline.ground.files import Extent, File
from pipeline.ground.model_modules import Kind
from pipeline.ground.ranks import Budget, water_filled
from pipeline.ground.shards import Entry
from pipeline.ground.whitening import Inputs
from pipeline.weight import Checkpoint, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extraction:
    """What was compared and chosen; `facts` of each parameter once it is done."""

    base: Checkpoint[Weight]
    tuned: Checkpoint[Weight]
    chosen: Chosen
    disk: int  # bytes of the adapter, at most
    spool: int  # bytes of the factors that are put aside before they are laid out, at most
    memory: int  # bytes for matrices while they are decomposed, at most
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0  # that decomposing took
    inputs: Mapping[str, Inputs] = field(default_factory=dict)  # of parameters whose outputs decided
    texts: tuple[File, ...] = ()  # that those were taken from

    @property
    def needed(self) -> int:
        """Bytes on the disk of the output when the adapter is made, at most."""
        return self.disk + self.spool


@dataclass(frozen=True)
class Planned(Delta):
    """What an extraction will put here: a low rank of at most `most`, or the whole, where it is 0."""

    most: int
    is_stack: bool = False

    @property
    def replaces(self) -> bool:  # type: ignore[override]
        return not self.most

    @property
    def stacked(self) -> bool:
        return self.is_stack

    @property
    def entries(self) -> tuple[Entry, ...]:
        return ()

    @property
    def rank(self) -> int | None:
        return self.most or None

    def describe(self, factor: float) -> str:
        return f"LoRA to be extracted, rank at most {self.most}" if self.most else "saved whole"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        raise AssertionError("a planned extraction has no values")

        def rows(start: int, stop: int, W: Tensor) -> Tensor: ...

        yield rows


def planned(chosen: Chosen, rule: Rule) -> tuple[Delta, ...]:
    """The deltas that the adapter will have, with the ranks that they may reach."""
    lora: list[Delta] = [
        Planned(p.module, p.place.parameter, p.shape, rule.most(p), _is_stack(p)) for p in chosen.lora
    ]
    return (*lora, *(_whole(p) for p in (*chosen.biases, *chosen.saved)))


def _is_stack(p: Parameter) -> bool:
    return len(p.shape) == 3 and p.place.kind is Kind.parameter


def _whole(p: Parameter) -> Delta:
    weights = [pair.tuned for pair in p.pairs]
    if len(weights) == 1 and (source := weights[0].source):
        return Saved(p.module, p.place.parameter, p.shape, source)
    if not _is_stack(p):
        nowhere = Extent(File(Path(p.name), 0, 0), 0, 0)  # until it is written
        return Saved(p.module, p.place.parameter, p.shape, Entry(p.name, "F32", p.shape, nowhere))
    return Planned(p.module, p.place.parameter, p.shape, 0, _is_stack(p))


def most_bytes(chosen: Chosen, rule: Rule, dtype: str) -> int:
    """Bytes of the adapter's tensors, at most."""
    element = num_bytes(dtype, (1,)) or 0
    factors = sum(num_parameters(p, rule.most(p)) for p in chosen.lora) * element
    if isinstance(rule.rank, Budget):
        factors = min(factors, rule.rank.amount * (1 if rule.rank.in_bytes else element))
    return factors + sum(saved_bytes(p) for p in (*chosen.saved, *chosen.biases))


def spool_bytes(chosen: Chosen, rule: Rule) -> int:
    """Bytes of all factors as they are found, in float32 and one copy each, at most."""
    return 4 * sum(num_parameters(p, rule.most(p)) // p.num_copies for p in chosen.lora)


def ranks(chosen: Chosen, rule: Rule, dtype: str, decomposed: Sequence[Sequence[Decomposed]]) -> list[int]:
    """The rank of each parameter; 0 where nothing of it is worth keeping."""
    longest = [max((len(d.S) for d in matrices), default=0) for matrices in decomposed]
    if not isinstance(rule.rank, Budget):
        return longest
    free = [n for n, p in enumerate(chosen.lora) if rule.fixed(p) is None]
    spectra = [_spectrum(decomposed[n], longest[n]) for n in free]
    costs = [num_parameters(chosen.lora[n], 1) for n in free]
    filled = water_filled(spectra, costs, _purse(chosen, rule, rule.rank, dtype), rule.multiple_of)
    for n, rank in zip(free, filled, strict=True):
        longest[n] = rank
    return longest


def check_budget(chosen: Chosen, rule: Rule, dtype: str) -> None:
    """Refused for a budget that buys no rank at all."""
    if not isinstance(rule.rank, Budget):
        return
    free = [p for p in chosen.lora if rule.fixed(p) is None]
    steps = [num_parameters(p, min(rule.multiple_of, rule.most(p))) for p in free]
    left = _purse(chosen, rule, rule.rank, dtype)
    if left < min(steps, default=0):
        rest = (
            ", after what is saved whole or has its rank by rank_pattern"
            if len(free) < len(chosen.lora) or chosen.saved
            else ""
        )
        raise Refused(
            f"rank: a budget of {rule.rank.amount:,} leaves nothing for any module{rest}; give a larger one"
        )


def _purse(chosen: Chosen, rule: Rule, budget: Budget, dtype: str) -> int:
    """Parameters that a budget leaves to the modules whose ranks it decides."""
    whole = (*chosen.saved, *chosen.biases)
    if budget.in_bytes:
        left = (budget.amount - sum(map(saved_bytes, whole))) // (num_bytes(dtype, (1,)) or 1)
    else:
        left = budget.amount - sum(p.num_copies * prod(p.shape) for p in whole)
    return left - sum(num_parameters(p, rule.most(p)) for p in chosen.lora if rule.fixed(p) is not None)


def _spectrum(matrices: Sequence[Decomposed], count: int) -> list[float]:
    """Of several matrices that share a rank: the energies of their triples together."""
    return [float(sum(d.worth[i] ** 2 for d in matrices if i < len(d.S)) ** 0.5) for i in range(count)]


def facts(p: Parameter, rank: int, matrices: Sequence[Decomposed]) -> dict[str, Any]:
    """What a parameter's low rank holds, for the report."""
    energy = sum(d.energy for d in matrices)
    held = sum(d.captured(rank) * d.energy for d in matrices)
    noise = sum(d.noise for d in matrices)
    return {
        "rank": rank,
        "energy": energy,
        "captured": held / energy if energy else 1.0,
        "residual": max(1 - held / energy, 0.0) ** 0.5 if energy else 0.0,
        "noise_share": min(noise / energy, 1.0) if energy else 0.0,
        "largest": max((max(d.S) for d in matrices if d.S), default=0.0),
        "noise_edge": max(d.edge for d in matrices),
        **in_outputs(rank, matrices),
    }
