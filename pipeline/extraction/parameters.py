"""What can be extracted: the parameters of the model in memory, each with the rows of files that it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from pipeline.extraction.differences import Change
from pipeline.extraction.pairs import Pair
from pipeline.ground.canonical_names import NUMBER, canonical
from pipeline.ground.model_modules import Kind, Model, Place, guessed
from pipeline.ground.names import matches

_EXPERT = re.compile(rf"(.*\.experts)\.({NUMBER})\.(gate_up_proj|gate_proj|up_proj|down_proj)\.weight")
_HALVES = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a weight of both checkpoints."""

    pair: Pair
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """One parameter; `matrices` are what is decomposed on its own: one, or one for each expert."""

    place: Place
    shape: tuple[int, ...]
    matrices: tuple[tuple[Slice, ...], ...]

    @property
    def module(self) -> str:
        return self.place.module

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def pairs(self) -> list[Pair]:
        """The weights of the files that it is made of."""
        return list({s.pair.name: s.pair for slices in self.matrices for s in slices}.values())

    @property
    def takes_lora(self) -> bool:
        return self.place.kind is not Kind.other and not any(pair.resized for pair in self.pairs)

    @property
    def num_copies(self) -> int:
        """How often a file holds it: PEFT wants embeddings once more for the head that shares them."""
        return 2 if self.place.shared and self.place.kind is Kind.embedding else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of what is decomposed."""
        if len(self.shape) == 3 and self.place.kind is Kind.parameter:
            return self.shape[1], self.shape[2]
        return self.shape[0], prod(self.shape[1:])

    @property
    def rank_name(self) -> str:
        """What rank_pattern calls it."""
        return self.name if self.place.kind is Kind.parameter else self.module

    def change(self, changes: Mapping[str, Change]) -> Change:
        """Of all its weights together."""
        found = [changes[pair.name] for pair in self.pairs]
        energies = sum(c.energy for c in found), sum(c.base_energy for c in found)
        return Change(*energies, any(c.resized for c in found))

    def is_meant(self, patterns: Iterable[str]) -> bool:
        """Whether a recipe's patterns name it, as the model or as the files call it."""
        names = {self.module, *(pair.name.rpartition(".")[0] for pair in self.pairs)}
        if self.place.kind is Kind.parameter:
            names |= {self.name, *(pair.name for pair in self.pairs)}
        return any(matches(name, pattern) for name in names for pattern in patterns)


def parameters(
    pairs: Sequence[Pair], model: Model | None, model_type: str | None
) -> tuple[tuple[Parameter, ...], tuple[Pair, ...]]:
    """The parameters of the model, and the weights of the files that it has no place for.

    Without the model, files stand for it as they are.
    """
    if model is None:
        places = [guessed(pair.name, pair.tuned.shape, model_type) for pair in pairs]
        return tuple(_own(pair, place) for pair, place in zip(pairs, places, strict=True)), ()
    found: list[Parameter] = []
    experts: defaultdict[str, dict[int, dict[str, Pair]]] = defaultdict(lambda: defaultdict(dict))
    homeless: list[Pair] = []
    for pair in pairs:
        name = canonical(pair.name)
        if place := model.places.get(name) or _other_depth(name, model):
            found.append(_own(pair, place))
        elif (one := _EXPERT.fullmatch(name)) and (fused := _fused(one, model)):
            experts[fused][int(one[2])][one[3]] = pair
        else:
            homeless.append(pair)
    for fused, held in experts.items():
        stacked = _stacked(model.places[fused], held)
        if stacked is None:
            homeless += [pair for by_name in held.values() for pair in by_name.values()]
        else:
            found.append(stacked)
    return tuple(found), tuple(homeless)


def _other_depth(name: str, model: Model) -> Place | None:
    """A place whose name has one component more or less in front: files of a model without its head."""
    return model.places.get(name.partition(".")[2]) or next(
        (p for n, p in model.places.items() if n.partition(".")[2] == name), None
    )


def _own(pair: Pair, place: Place) -> Parameter:
    shape = pair.tuned.shape
    if len(shape) == 3 and place.kind is Kind.parameter:
        height = shape[1]
        matrices = tuple((Slice(pair, e * height, (e + 1) * height),) for e in range(shape[0]))
    else:
        matrices = ((Slice(pair, 0, pair.tuned.num_rows),),)
    return Parameter(place, shape, matrices)


def _fused(one: re.Match[str], model: Model) -> str | None:
    """The parameter in memory that holds this expert's projection."""
    names = [f"{one[1]}.{one[3]}", *([f"{one[1]}.gate_up_proj"] if one[3] in _HALVES else [])]
    return next((n for n in names if n in model.places and len(model.places[n].shape) == 3), None)


def _stacked(place: Place, held: Mapping[int, Mapping[str, Pair]]) -> Parameter | None:
    """All experts' projections as the parameter that holds them; None where they do not fit it."""
    matrices = []
    for expert in range(place.shape[0]):
        pairs = list(_in_order(held.get(expert, {})))
        rows, widths = sum(p.tuned.shape[0] for p in pairs), {p.tuned.shape[1] for p in pairs}
        if (rows, *widths) != place.shape[1:] or place.is_transposed:
            return None
        matrices.append(tuple(Slice(pair, 0, pair.tuned.num_rows) for pair in pairs))
    return Parameter(place, place.shape, tuple(matrices))


def _in_order(held: Mapping[str, Pair]) -> Iterator[Pair]:
    for name in ("gate_up_proj", *_HALVES, "down_proj"):
        if name in held:
            yield held[name]
