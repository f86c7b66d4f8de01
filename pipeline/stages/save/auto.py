"""save=auto: what a request writes when it does not say."""

from collections.abc import Mapping
from typing import Any

from pipeline.stage import Save, choice


@choice(Save)
def auto(request: Mapping[str, Any]) -> str:
    """merged: the base with the adapter in it."""
    return "merged"
