"""The smallest value of one swept key that is near enough, in few runs: log2 of the number of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def axis(swept: Mapping[str, Sequence[str]]) -> tuple[str, list[str]] | None:
    """The one key with several values and these in ascending order; None where not all are numbers."""
    several = [(key, values) for key, values in swept.items() if len(set(values)) > 1]
    if len(several) != 1:
        return None
    [(key, values)] = several
    try:
        return key, sorted(dict.fromkeys(values), key=float)
    except ValueError:
        return None


def bisect(values: Sequence[str], near_enough: Callable[[str], bool | None]) -> None:
    """Tries values until the first that is near enough has been tried, and the one before it.

    It takes all values after one that is near enough to be so too. None says nothing of the others.
    """
    left = list(values)
    low, high = 0, len(left)  # those before `low` are not, those from `high` on are
    while low < high:
        middle = (low + high) // 2
        match near_enough(left[middle]):
            case True:
                high = middle
            case False:
                low = middle + 1
            case None:
                del left[middle]
                high -= 1
