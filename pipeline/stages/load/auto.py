"""load=auto: gguf for a GGUF file (or a folder with nothing else in it), otherwise safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stage import Load, choice


@choice(Load)
def auto(request: Mapping[str, Any]) -> str:
    """gguf where base_model is a .gguf file, or a folder that holds one and no safetensors."""
    base = Path(os.path.expanduser(str(request.get("base_model") or "")))  # noqa: PTH111  ~nobody is a name
    if base.suffix == ".gguf":
        return "gguf"
    if base.is_dir() and any(base.glob("*.gguf")) and not any(base.glob("*.safetensors*")):
        return "gguf"
    return "safetensors"
