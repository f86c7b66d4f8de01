"""What a manifest says went in and came out: files with their hashes, and where they came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROLES = ("base", "finetune", "adapter")


def digests(files: Any, owned: bool = False) -> list[dict[str, Any]]:
    """Files with their hashes as a manifest lists them, and whose each is if they are `owned`.

    What is no such thing is left out: a manifest that somebody else wrote may hold anything.
    """
    found = []
    for file in _tables(files):
        name, size, sha256, of = (file.get(key) for key in ("name", "num_bytes", "sha256", "of"))
        hashed = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
        if isinstance(name, str) and isinstance(size, int) and hashed and (of in _ROLES or not owned):
            told = {"name": name, "num_bytes": size, "sha256": sha256}
            inherited = {"inherited": file.get("inherited") is True}
            found.append(told | inherited | ({"of": of} if owned else {}))
    return found


def origins(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Base, fine-tune and adapters as a manifest names them: whose, name, repo, commit, and their weights."""
    told = [(of, facts) for of in _ROLES[:2] for facts in _tables([manifest.get(of)])]
    told += [("adapter", facts) for facts in _tables(manifest.get("adapters"))]
    found = []
    for of, facts in told:
        name, weight = facts.get("name"), facts.get("weight")
        texts = {key: v if isinstance(v := facts.get(key), str) else None for key in ("repo", "commit")}
        weighed = {"weight": float(weight)} if isinstance(weight, int | float) else {}
        if isinstance(name, str):
            found.append({"of": of, "name": name, **texts, **weighed})
    return found


def _tables(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []
