"""extract=auto: which extraction a request means."""

from collections.abc import Mapping
from typing import Any

from pipeline.stage import Extract, choice


@choice(Extract)
def auto(request: Mapping[str, Any]) -> str:
    """svd: a fine-tune without an adapter; otherwise peft: the adapter that `adapter` names."""
    return "svd" if request.get("finetune") and not request.get("adapter") else "peft"
