"""Bytes, durations and distances, as people write and read them."""

from __future__ import annotations

import re

from pipeline.ground.errors import Refused

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(key: str, value: str | int) -> int:
    """5GB, 500MB, 40GiB or a plain number of bytes; Refused, naming the key, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
    unit = {**_UNITS, **_BINARY_UNITS}.get(match[2]) if match else None
    number = int(float(match[1]) * unit) if match and unit else 0
    if number <= 0:
        raise Refused(f"{key}: {value!r} is not a size; write it as 5GB, 500MB or 4GiB")
    return number


def show_bytes(count: float) -> str:
    """2.47 GB, 135 MB, 12 kB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def show_seconds(seconds: float) -> str:
    """0.43 s, 12.1 s, 3 min 20 s."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def show_ulps(distance: float) -> str:
    """0.4999 ulp, 12.3 billion ulp: units in the last place; a value that is another one has many."""
    if distance >= 1e15:
        return "over a thousand trillion ulp"
    for word, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if distance >= size:
            return f"{distance / size:.3g} {word} ulp"
    return f"{distance:.4g} ulp"
