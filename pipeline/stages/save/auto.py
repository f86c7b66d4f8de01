"""save=auto: what a request writes when it does not say."""

from collections.abc import Mapping
from typing import Any

from pipeline.stage import Save, choice


@choice(Save)
def auto(request: Mapping[str, Any]) -> str:
    """adapter: one extracted from a fine-tune; otherwise merged: the base with the adapter in it."""
    return "adapter" if request.get("finetune") and not request.get("adapter") else "merged"
