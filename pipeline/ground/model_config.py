"""config.json: what a merge has to know of it, and the few fields it changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.ground.errors import Refused
from pipeline.ground.tables import read_table

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")


class ConfigSource(Protocol):
    """A model's config: a file, or what a GGUF file's metadata amount to."""

    @property
    def model_type(self) -> str | None: ...

    @property
    def tied(self) -> bool | None:
        """Whether lm_head shares the embeddings; None where the config does not say."""

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """How a quantized checkpoint says that it is, at whatever depth it says so; {} for others."""

    def read(self) -> dict[str, Any]: ...

    def text(self, edits: Mapping[str, Any]) -> str:
        """config.json with these fields changed; the very text of the base's where there are none."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """config.json as it stands in a folder."""

    path: Path

    @property
    def model_type(self) -> str | None:
        return self.read().get("model_type")

    @property
    def tied(self) -> bool | None:
        config = self.read()
        inner = config.get("text_config")
        nested = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        return config.get("tie_word_embeddings", nested)

    @property
    def quantization_config(self) -> dict[str, Any]:
        for config in _levels(self.read()):
            for key in QUANTIZATION_KEYS:
                if isinstance(found := config.get(key), dict):
                    return found
        return {}

    def check(self) -> None:
        """Refused if it stands there and would have a loader run code."""
        if self.path.is_file():
            self.read()

    def read(self) -> dict[str, Any]:
        try:
            config = read_table(self.path)
            levels = _levels(config)
        except FileNotFoundError:
            raise Refused(f"{self.path.parent}: has no config.json") from None
        except RecursionError:
            raise Refused(f"{self.path}: is nested too deeply") from None
        if odd := [key for level in levels for key in level if key.startswith("_attn_implementation")]:
            raise Refused(f"{self.path}: sets '{odd[0]}', by which old loaders fetch and run code; remove it")
        return config

    def text(self, edits: Mapping[str, Any]) -> str:
        if not edits:
            return self.path.read_bytes().decode()
        return json.dumps(edited(self.read(), edits), indent=2, ensure_ascii=False) + "\n"


def edited(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """The config with fields changed.

    `dtype` changes at every depth where it stood, under the key it had; `tie_word_embeddings` too, and at
    the top; `quantization_config` goes from every depth and, unless it is None, to the top; `vocab_size`
    changes at the top or in `text_config`, wherever it stood.
    """
    changed = json.loads(json.dumps(config))
    if QUANTIZATION_KEYS[0] in edits:
        for level in _levels(changed):
            for key in QUANTIZATION_KEYS:
                level.pop(key, None)
    for field, value in edits.items():
        if field == QUANTIZATION_KEYS[0] and value is None:
            continue
        if field == "tie_word_embeddings":
            for level in _levels(changed):
                if level is changed or field in level:
                    level[field] = value
            continue
        if field == "vocab_size" and isinstance(changed.get("text_config"), dict):
            changed["text_config"][field] = value
            if field in changed:
                changed[field] = value
            continue
        if field != "dtype":
            changed[field] = value
            continue
        for level in _levels(changed):
            for key in _DTYPE_KEYS:
                if key in level or (level is changed and key == "dtype" and "torch_dtype" not in level):
                    level[key] = value
    assert isinstance(changed, dict)
    return changed


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and every table inside it."""
    return [config, *(level for v in config.values() if isinstance(v, dict) for level in _levels(v))]
