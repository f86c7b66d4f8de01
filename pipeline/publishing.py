"""A request as it may be published: no paths of this machine, no defaults that say nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.stage import SLOTS

_FILES = ("verify.text", "extract.calibration")  # settings of stages that name a file


def publishable(table: Mapping[str, Any]) -> dict[str, Any]:
    """The root keys that say something, folders and files by their names alone."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in SLOTS and isinstance(value, dict):
            found[key] = {k: _own_file(f"{key}.{k}", v) for k, v in value.items() if v is not None}
        elif key in ("output", "report", "debug", "dry_run", "sweep") or value in (None, {}, []):
            continue
        elif key == "adapter" and isinstance(value, list):
            found[key] = [_published(item) for item in value]
        elif key in ("base_model", "adapter", "finetune") and os.path.exists(os.path.expanduser(str(value))):  # noqa: PTH110, PTH111
            found[key] = Path(str(value)).name
        else:
            found[key] = value.value if isinstance(value, Enum) else value
    return found


def _published(adapter: Any) -> Any:
    """One of several adapters, without the path of this machine."""
    path = str(adapter["path"] if isinstance(adapter, dict) else adapter)
    name = Path(path).name if os.path.exists(os.path.expanduser(path)) else path  # noqa: PTH110, PTH111
    return {**adapter, "path": name} if isinstance(adapter, dict) else name


def _own_file(key: str, value: Any) -> Any:
    return Path(str(value)).name if key in _FILES else value
