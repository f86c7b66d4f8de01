"""How the fields of stages become settings that a recipe can give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass
from keyword import iskeyword
from typing import Any

SET_AS = "set as"


def set_as(slot: str, name: str) -> dict[str, tuple[str, str]]:
    """Metadata of a field that has the value of another slot's, where the stage there has such a field."""
    return {SET_AS: (slot, name)}


def key_of(f: Field[Any]) -> str:
    """What a recipe calls a field: a word of Python's is followed by a line in code, `for_`."""
    return f.name[:-1] if f.name.endswith("_") and iskeyword(f.name[:-1]) else f.name


def with_fields(name: str, settings: Iterable[tuple[str, Any, Any]]) -> type:
    """A dataclass of (key, type, default), as make_dataclass gives; of any keys, such as `for`."""

    def init(self: Any, **values: Any) -> None:
        vars(self).update(values)

    settings = list(settings)
    body = {key: default for key, _, default in settings}
    hints = {key: kind for key, kind, _ in settings}
    cls = type(name, (), {**body, "__annotations__": hints, "__init__": init})
    return dataclass(init=False, repr=False, eq=False)(cls)
