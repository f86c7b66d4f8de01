"""Where in a checkpoint's files lies what an adapter's module means.

An adapter speaks the names of a model in memory, of whichever transformers it was trained with; files speak
their own. The same model keeps its experts as one 3-D parameter in memory and as a weight per expert and
projection on disk, or the other way round.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.ground.canonical_names import BARE_PREFIXES, NUMBER, canonical, stack
from pipeline.ground.errors import Refused
from pipeline.ground.names import renamed

_PROJECTIONS = "gate_up_proj|gate_proj|up_proj|down_proj"
_EXPERT = re.compile(rf"(.*\.experts)\.({NUMBER})\.({_PROJECTIONS})\.(weight|bias)")
_EXPERTS = re.compile(rf"(.*\.experts)\.({_PROJECTIONS})(_bias)?")
_HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, in this order


@dataclass(frozen=True, slots=True)
class Site:
    """Where a module's parameter, or a part of it, lies: a weight of the checkpoint."""

    weight: str
    """the checkpoint's name"""
    matrix: int | None = None
    """which expert: the index along the first axis of whichever side is 3-D, weight or parameter"""
    part: int = 0
    """which of `parts` equal consecutive blocks of out-features of the fused side: gate is 0, up is 1"""
    parts: int = 1


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a mixture of experts holds of one projection: `container` is canonical, `kind` weight or bias."""

    container: str
    projection: str
    kind: str

    @property
    def fused(self) -> str:
        """The canonical name of all experts' as one tensor, with the experts along its first axis."""
        return f"{self.container}.{self.projection}" + ("_bias" if self.kind == "bias" else "")

    def of(self, projection: str, kind: str = "weight") -> _Tensors:
        return _Tensors(self.container, projection, kind)


class Names:
    """The weights of a checkpoint, found by the names that adapters have for them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], renames: Mapping[str, str] = {}) -> None:
        """All weights of the checkpoint; `renames` {from: to} changes leading components of modules first."""
        self._shapes = shapes
        self._renames = renames

    def find(self, module: str, parameter: str) -> tuple[Site, ...]:
        """The weights that `module`'s `parameter` means, () if the checkpoint has none.

        A fused parameter over files with a weight per expert gives them all, by expert and part. Refused if
        two weights answer equally well, or if experts are missing.
        """
        asked = ".".join(part for part in (renamed(module, self._renames), parameter) if part)
        if asked in self._shapes:
            return (Site(asked),)
        wanted = canonical(asked)
        answers = list(self._answers(wanted, asked)) or [
            sites for name in self._other_depths(wanted) for sites in self._answers(name, asked)
        ]
        if len(answers) > 1:
            raise _unclear(asked, (sites[0].weight for sites in answers))
        if not answers:
            return ()
        found_in = stack(canonical(answers[0][0].weight))
        if found_in and len(stacks := self._stacks[found_in]) > 1:
            raise _unclear(asked, (f"a module of {name}" for name in stacks))
        return answers[0]

    def _answers(self, wanted: str, asked: str) -> Iterator[tuple[Site, ...]]:
        """What answers this canonical name; each answer alone would do."""
        for name in self._by_canonical.get(wanted, ()):
            yield (Site(name),)
        if one := _EXPERT.fullmatch(wanted):
            yield from self._within_fused(_Tensors(one[1], one[3], one[4]), int(one[2]), asked)
        elif all_ := _EXPERTS.fullmatch(wanted):
            kind = "bias" if all_[3] else "weight"
            yield from self._over_experts(_Tensors(all_[1], all_[2], kind), asked)

    def _other_depths(self, wanted: str) -> Iterator[str]:
        """The name with or without the prefix of a base model, unless the checkpoint knows it as it is.

        One prefix never stands for another: bert. and roberta. hold the same modules, and other weights.
        """
        if (layers := stack(wanted)) and layers in self._stacks:
            return
        first, _, rest = wanted.partition(".")
        if first in BARE_PREFIXES:
            yield rest
        else:
            for prefix in self._prefixes:
                yield f"{prefix}.{wanted}"

    def _within_fused(self, tensors: _Tensors, expert: int, asked: str) -> Iterator[tuple[Site, ...]]:
        """The fused tensors that hold this expert's projection."""
        rank = 3 if tensors.kind == "weight" else 2
        for name in self._fused(tensors, rank, expert):
            yield (Site(name, expert),)
        if tensors.projection in _HALVES and tensors.kind == "weight":
            for name in self._fused(tensors.of("gate_up_proj"), rank, expert):
                self._check_halves(tensors, asked)
                yield (Site(name, expert, _HALVES.index(tensors.projection), 2),)

    def _fused(self, tensors: _Tensors, rank: int, expert: int) -> Iterator[str]:
        for name in self._by_canonical.get(tensors.fused, ()):
            if len(shape := self._shapes[name]) == rank and expert < shape[0]:
                yield name

    def _over_experts(self, tensors: _Tensors, asked: str) -> Iterator[tuple[Site, ...]]:
        """The weights of all experts that together are this fused tensor."""
        if sites := self._each_expert([tensors], asked):
            yield sites
        if tensors.projection == "gate_up_proj" and tensors.kind == "weight":
            halves = [tensors.of(half) for half in _HALVES]
            if sites := self._each_expert(halves, asked):
                self._check_halves(tensors, asked)
                yield sites

    def _each_expert(self, parts: list[_Tensors], asked: str) -> tuple[Site, ...]:
        held = [self._experts.get(part, {}) for part in parts]
        if not any(held):
            return ()
        sites = []
        for expert in range(1 + max(max(names) for names in held if names)):
            for part, names in enumerate(held):
                if expert not in names:
                    sample = next(given[0] for names in held for given in names.values())
                    raise Refused(
                        f"adapter: '{asked}' means all experts beside {sample}, but the base lacks "
                        f"{parts[part].projection} of expert {expert}"
                    )
                if len(names[expert]) > 1:
                    raise _unclear(asked, names[expert])
                sites.append(Site(names[expert][0], expert, part, len(parts)))
        return tuple(sites)

    def _check_halves(self, tensors: _Tensors, asked: str) -> None:
        """Experts with biases are gpt-oss's, whose gate and up may alternate column by column."""
        pair, gate = tensors.of("gate_up_proj", "bias"), tensors.of("gate_proj", "bias")
        if pair.fused in self._by_canonical or pair in self._experts or gate in self._experts:
            raise Refused(
                f"adapter: '{asked}' and the base differ in whether gate and up are one weight, and names do "
                "not show how the two lie in it where experts have biases; convert the adapter to the base's "
                "layout"
            )

    @cached_property
    def _by_canonical(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._shapes:
            found.setdefault(canonical(name), []).append(name)
        return found

    @cached_property
    def _experts(self) -> Mapping[_Tensors, dict[int, list[str]]]:
        """By projection and expert, the weights of a checkpoint that keeps its experts apart."""
        found: defaultdict[_Tensors, dict[int, list[str]]] = defaultdict(dict)
        for name, given in self._by_canonical.items():
            if match := _EXPERT.fullmatch(name):
                found[_Tensors(match[1], match[3], match[4])][int(match[2])] = given
        return dict(found)

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return BARE_PREFIXES & {name.partition(".")[0] for name in self._by_canonical}

    @cached_property
    def _stacks(self) -> Mapping[str, set[str]]:
        """Of each canonical stack of layers the checkpoint's own; two of them cannot be told apart by name.

        A layer that only one of them has would be found otherwise, which proves nothing.
        """
        found: defaultdict[str, set[str]] = defaultdict(set)
        for name, given in self._by_canonical.items():
            found[stack(name)].update(stack(own) for own in given)
        return found


def _unclear(asked: str, candidates: Iterator[str] | list[str]) -> Refused:
    return Refused(
        f"adapter: '{asked}' could mean {' or '.join(sorted(candidates))}; names={{from: to}} says which"
    )
