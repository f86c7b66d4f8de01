"""A checkpoint's modules by the names that an adapter has, or would have, for them.

Files and adapters of several eras spell one module differently; PEFT's rules speak the adapter's spelling.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.ground.canonical_names import NUMBER, canonical, stack
from pipeline.ground.names import renamed

_NUMBERS = re.compile(rf"(?<![^.]){NUMBER}(?![^.])")
_WRAPPED = re.compile(r"\.(base_layer|token_adapter)(?=\.|$)")
# Heads that predict several tokens ahead: in the files only.
_AHEAD = re.compile(r"(^|\.)(mtp|nextn)[^.]*\.")
_AHEAD_LAYER = ".eh_proj."  # a further layer with it is such a head: DeepSeek-V3, GLM-4.5
_NOT_TEXT = re.compile(r"vis|vit|image|video|audio|speech")


@dataclass(frozen=True, slots=True)
class Module:
    """A module that has a parameter of its own in the checkpoint."""

    weight: str
    """the checkpoint's name of the parameter"""
    name: str
    """the module, as the adapter spells it"""
    canonical: str
    kind: str
    """the canonical name with * for every number: the same in all layers"""
    dims: int
    """of the parameter, if it is a weight; 0 of a bias, and of a bare parameter"""

    @property
    def stack(self) -> str:
        """The layers it is one of, by their canonical name; '' outside of them."""
        return stack(self.canonical)

    @property
    def is_matrix(self) -> bool:
        """Whether LoRA could be on it."""
        return self.dims >= 2

    @property
    def layer(self) -> int:
        """Which layer of its stack."""
        return int(_numbers(self.canonical)[0])


@dataclass(frozen=True, slots=True)
class BaseModules:
    """The modules of a checkpoint that an adapter's model in memory has too, as far as names tell."""

    modules: tuple[Module, ...]
    """loose ones, and those of the stacks of layers in which the adapter has something"""
    apart: Mapping[str, tuple[str, ...]]
    """all others that LoRA could be on, by their stack, as the checkpoint spells them"""
    own: Mapping[str, str]
    """the adapter's modules by their canonical names"""
    kinds: frozenset[str] = field(init=False)
    """that the adapter has modules of"""
    strange: frozenset[str] = field(init=False)
    """stacks, canonical, in which the adapter has modules that the files do not have under any spelling"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", frozenset(map(_kind, self.own)))
        known = {above for kind in {m.kind for m in self.modules} for above in prefixes(kind)}
        strange = {stack(c) for c in self.own if "experts" not in c.split(".") and _kind(c) not in known}
        object.__setattr__(self, "strange", frozenset(strange))

    def lacking(self, like: Iterable[str]) -> list[str]:
        """Modules where a layer of the checkpoint has something, and the adapter lacks what it has elsewhere.

        `like` are modules of the adapter; experts are compared by where they stand, not by how they are
        stored.
        """
        spelling = {_kind(c): m for c, m in self.own.items() if m in set(like)}
        places = {above for module in self.modules for above in prefixes(module.canonical)}
        return [
            _numbered(spelling[kind], place)
            for place in sorted(places, key=by_number)
            if place not in self.own and (kind := _kind(place)) in spelling
        ]


def base_modules(
    held: Collection[str], base: Iterable[tuple[str, int]], num_layers: int | None, renames: Mapping[str, str]
) -> BaseModules:
    """`held`: the adapter's modules; `base`: the checkpoint's weights and how many dimensions they have.

    Layers from `num_layers` on, and heads that predict further tokens, are no part of a model in memory.
    """
    own = {_canonical(f"{renamed(module, renames)}.weight"): module for module in held}
    spelling = {_kind(c): module for c, module in own.items()}
    stacks = {stack(c): stack(module) for c, module in own.items()}
    base = [(name, dims) for name, dims in base if not _AHEAD.search(name)]
    ahead = {_layer(name) for name, _ in base if _AHEAD_LAYER in name}
    modules, apart = [], dict[str, list[str]]()
    for weight, dims in base:
        where, path = _canonical(weight), weight.rpartition(".")[0]
        if _layer(weight) in ahead or _is_beyond(where, num_layers):
            continue
        dims = dims if weight.endswith((".weight", ".in_proj_weight")) else 0
        if where in own:
            name = own[where]
        elif (kind := _kind(where)) in spelling:
            name = _numbered(spelling[kind], where)
        elif not stack(where) or stack(where) in stacks:
            name = stacks.get(stack(where), "") + path[len(stack(path)) :] if stack(where) else path
        else:
            if dims >= 2:
                apart.setdefault(stack(path), []).append(path)
            continue
        modules.append(Module(weight, name, where, _kind(where), dims))
    return BaseModules(tuple(modules), {tower: tuple(names) for tower, names in apart.items()}, own)


def plain(module: str) -> str:
    """The module that a key of an adapter file means, without what PEFT wraps it in."""
    return _WRAPPED.sub("", module)


def suffixes(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: what an entry of a list in the config can name it by."""
    parts = module.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def prefixes(module: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`: the modules that it is part of, and itself."""
    parts = module.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 17."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _canonical(weight: str) -> str:
    """The canonical name of the module that has this parameter; MultiheadAttention's one is its in_proj."""
    return canonical(re.sub(r"\.in_proj_weight$", ".weight", weight)).rpartition(".")[0]


def _kind(module: str) -> str:
    return _NUMBERS.sub("*", module)


def _numbers(module: str) -> list[str]:
    return _NUMBERS.findall(module)


def _numbered(like: str, module: str) -> str:
    """The name `like`, with this canonical module's numbers."""
    numbers = iter(_numbers(module))
    return _NUMBERS.sub(lambda found: next(numbers, found[0]), like)


def _layer(name: str) -> str | None:
    """`model.layers.61` of a name in that layer."""
    return name[: found.end()] if (found := _NUMBERS.search(name)) else None


def _is_beyond(module: str, num_layers: int | None) -> bool:
    where = stack(module)
    return bool(
        num_layers and where and not _NOT_TEXT.search(where) and int(_numbers(module)[0]) >= num_layers
    )
