"""An adapter kind: which tensors and config fields it has, and what they make of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry


@dataclass(frozen=True, slots=True)
class Told:
    """What only the user can say of an adapter, because its files do not."""

    residual_base: bool = False  # the base is the one that the init left over, not the original
    expert_major: bool = False  # lora_B of experts is packed as Unsloth does
    out_proj_times: int | None = None  # how often a MultiheadAttention's out_proj delta was applied


NOTHING_TOLD = Told()


@dataclass(frozen=True)
class Trained:
    """What an adapter file holds for one module: its tensors by suffix, those of all modules by key."""

    module: str
    tensors: Mapping[str, Entry]
    config: Mapping[str, Any]
    shared: Mapping[str, Entry] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()  # all that the file has tensors for, as their keys name them
    told: Told = NOTHING_TOLD

    def __getitem__(self, suffix: str) -> Entry:
        """The tensor; Refused where the module lacks it."""
        if suffix not in self.tensors:
            have = ", ".join(self.tensors)
            raise Refused(f"'{self.module}' has {have} but no {suffix}")
        return self.tensors[suffix]

    def get(self, suffix: str) -> Entry | None:
        """The tensor, if the module has it."""
        return self.tensors.get(suffix)

    def common(self, key: str) -> Entry:
        """A tensor that all modules share; Refused where the file lacks it."""
        if key not in self.shared:
            raise Refused(f"'{self.module}' needs {key}, which the file does not hold")
        return self.shared[key]

    def refuse(self, reason: str) -> Refused:
        """The sentence, for raising."""
        return Refused(f"'{self.module}' {reason}")


@dataclass(frozen=True)
class Kind:
    """One peft_type.

    `tensors`: suffixes that follow the module's name in a key; `shared`: keys that follow `base_model.`
    alone; `unused`: beginnings of suffixes that served training only. `fields`: what `read` understands of
    the config, with what only steers training. `refused`: fields that, when set, mean something that cannot
    be merged, and what. `read` gives the deltas of one module; it raises Refused by `Trained.refuse`.
    """

    peft_type: str
    tensors: tuple[str, ...]
    fields: frozenset[str]
    read: Callable[[Trained], list[Delta]]
    shared: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    wrong: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    """Sentences about fields whose values cannot be; they begin with the field's name."""


def check_floats(trained: Trained, *entries: Entry | None) -> None:
    """Refused if one of them does not hold plain floats."""
    odd = [e for e in entries if e is not None and e.dtype not in DENSE_FLOATS]
    if odd:
        raise trained.refuse(f"holds {odd[0].dtype} values; an adapter's are F64, F32, F16 or BF16")


def check_shapes(trained: Trained, sizes: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """The sizes that letters stand for in the tensors' shapes, as {"A": ("r", "in"), "B": ("out", "r")}.

    Refused if a letter would stand for two sizes or a number is not met.
    """
    letters: dict[str, int] = {}
    for suffix, wanted in sizes.items():
        shape = trained[suffix].shape
        told = " x ".join(map(str, wanted))
        if len(shape) != len(wanted):
            raise trained.refuse(f"has {suffix} {list(shape)}, which is not {told}")
        for size, letter in zip(shape, wanted, strict=True):
            known = letter if isinstance(letter, int) else letters.setdefault(letter, size)
            if size != known:
                raise trained.refuse(f"has {suffix} {list(shape)}, {letter} of {told} being {known}")
    return letters


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least one, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
