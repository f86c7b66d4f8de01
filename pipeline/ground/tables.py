"""JSON files that must be one table: read strictly, refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.ground.errors import Refused


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; Refused if it is not one. FileNotFoundError if there is none."""
    return parse_table(path.read_bytes(), f"{path}:")


def parse_table(text: bytes, where: str) -> dict[str, Any]:
    """The table in a JSON text; Refused, naming `where`, for anything two readers could take differently."""
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(f"{where} is not JSON ({reason})") from None
    if not isinstance(table, dict):
        raise Refused(f"{where} is not a table of fields")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(n for n in names if names.count(n) > 1)}' stands twice")
    return table
