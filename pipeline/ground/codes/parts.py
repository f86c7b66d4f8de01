"""The tensors of a module by their last names, and what a quantization config says of modules."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from pipeline.ground.codes.reading import read_small, refusal, told
from pipeline.ground.shards import Entry

Parts = Mapping[str, Entry]  # of one module: qweight, scales, bias


def by_module(tensors: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The tensors of every module by their last names, modules in the order of their first tensors."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = entry
    return modules


def sibling(entry: Entry, last: str) -> str:
    """The name of another tensor of its module: the dense `weight`, as a rule."""
    module, dot, _ = entry.name.rpartition(".")
    return f"{module}{dot}{last}"


def numbers(entry: Entry) -> list[int]:
    """The values of a small tensor of integers, flat; Refused if it is none."""
    code = {"U8": "B", "I8": "b", "I32": "i", "I64": "q"}.get(entry.dtype)
    if code is None:
        raise refusal(entry, f"is {told(entry)}, not whole numbers")
    return array(code, read_small(entry)).tolist()


def mentioned(settings: Mapping[str, Any], *keys: str) -> list[int]:
    """The whole numbers that a config gives under these keys, for all modules or for some of them."""
    tables = [settings]
    for overrides in (settings.get("dynamic"), settings.get("extra_config")):  # gptqmodel's, AutoRound's
        if isinstance(overrides, Mapping):
            tables += [table for table in overrides.values() if isinstance(table, Mapping)]
    values = [table.get(key) for table in tables for key in keys]
    return sorted({value for value in values if isinstance(value, int) and not isinstance(value, bool)})


def named(parts: Parts) -> str:
    """What a module holds, for a sentence: qweight I32 [512, 64], scales F16 [4, 64]."""
    return ", ".join(f"{part} {e.dtype} {list(e.shape)}" for part, e in parts.items() if part != "bias")
