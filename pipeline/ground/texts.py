"""The text on which models are compared where none is given: a bundled page, then Python's own handbook.

The page has some 700 tokens of many sorts; the handbook, English prose and code, comes with every Python as
`pydoc_data` and has more than anyone will ask for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files

_CHARACTERS = 8  # of a token, at most on average


def sample(num_tokens: int) -> str:
    """Text of at least so many tokens, or all there is."""
    page = files("pipeline.ground").joinpath("sample.txt").read_text("utf-8")
    needed = num_tokens * _CHARACTERS
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:  # left out by whoever packaged this Python
        return page
    told = [page]
    for name in sorted(topics):
        if sum(map(len, told)) >= needed:
            break
        told.append(topics[name])
    return "\n\n".join(told)
