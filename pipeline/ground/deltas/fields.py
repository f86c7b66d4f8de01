"""Values that a config field cannot have, each in a sentence that begins with the field's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from pipeline.ground.deltas.kind import is_count


def wrong_values(
    config: Mapping[str, Any],
    counts: Iterable[str] = (),
    numbers: Iterable[str] = (),
    flags: Iterable[str] = (),
    seeds: Iterable[str] = (),
    patterns: Mapping[str, bool] | None = None,
) -> list[str]:
    """Sentences about fields that are not what they have to be.

    `flags` may be missing; `patterns` are tables of counts (true) or of numbers.
    """
    checks = (
        (counts, is_count, "not a whole number above 0"),
        (numbers, is_number, "not a finite number"),
        (flags, _is_flag, "neither true nor false"),
        (seeds, _is_seed, "not a seed, so what it drew cannot be drawn again"),
    )
    wrong = [
        f"{name} is {config.get(name)!r}, {what}"
        for names, fits, what in checks
        for name in names
        if not fits(config.get(name))
    ]
    for name, counted in (patterns or {}).items():
        table, fits = config.get(name) or {}, is_count if counted else is_number
        if not isinstance(table, dict) or not all(fits(value) for value in table.values()):
            wrong.append(f"{name} is {table!r}, not a table of patterns and numbers")
    return wrong


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def is_number(value: Any) -> bool:
    """Whether it is a finite number and no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
