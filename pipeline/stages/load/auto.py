"""load=auto: gguf for a GGUF file (or a folder with nothing else in it), otherwise safetensors."""

from collections.abc import Mapping
from typing import Any

from pipeline.loading import is_gguf
from pipeline.stage import Load, choice


@choice(Load)
def auto(request: Mapping[str, Any]) -> str:
    """gguf where base_model is a .gguf file, or a folder that holds one and no safetensors."""
    return "gguf" if is_gguf(str(request.get("base_model") or "")) else "safetensors"
