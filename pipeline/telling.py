"""What went wrong, in sentences on stderr, and the exit status that it means."""

from __future__ import annotations

import sys

from pipeline.ground.errors import Refused
from pipeline.refusing import understood


def failed(error: Exception) -> int:
    """Tells an error in sentences, and gives the exit status it means."""
    known = understood(error, _argument)
    for told in known.sentences if isinstance(known, Refused) else [str(known)] if known else []:
        tell(told)
    if known:
        return 2 if isinstance(known, Refused) else 1
    name = type(error).__name__
    tell(f"internal error: {name}: {first_line(error)}; run again with debug=true and report it")
    return 1


def is_known(error: Exception) -> bool:
    """Whether it says something of the request or the machine, and is no fault of ours."""
    return understood(error, _argument) is not None


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), "")


def tell(what: str) -> None:
    """One sentence on stderr, with nothing in it that a terminal would obey."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in what)
    sys.stderr.write(f"error: {plain}\n")


def _argument(key: str) -> str:
    """The value that the command line gives a key."""
    return next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith(f"{key}=")), "")
