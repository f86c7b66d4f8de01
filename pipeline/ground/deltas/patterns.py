"""rank_pattern and alpha_pattern: the value that a config gives one module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from pipeline.ground.errors import Refused


def pattern_value(module: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
    """The value of the first pattern that ends the module's path, as peft.utils.get_pattern_key finds it."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise Refused(f"pattern {pattern!r} is not a regular expression ({error})") from None
    return otherwise


def wrong_patterns(field: str, patterns: Iterable[str]) -> Iterator[str]:
    """A sentence for each pattern of a config's field that cannot be one."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{field} has {pattern!r}, which is no regular expression ({error})"
