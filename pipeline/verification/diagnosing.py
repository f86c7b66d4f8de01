"""A merge that was refused, looked at once more: what likely went wrong, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.ground import belongings
from pipeline.ground.causes import causes
from pipeline.ground.folder import Folder
from pipeline.ground.model_config import edited
from pipeline.ground.report import Gate, Status
from pipeline.ground.sidefiles import SideFile, brings_tokenizer, chosen
from pipeline.ground.written import Written
from pipeline.verification.sampling import looked_at
from pipeline.weight import Adapter, Checkpoint, Output, Weight

_HEADS = ("lm_head.weight", "model.embed_tokens.weight")


def diagnose(output: Output, base: Checkpoint[Weight]) -> tuple[str, ...]:
    """The likely causes of a failed gate, the gravest first; empty where nothing known fits."""
    folder = Written(output.folder)
    found = {name: shape for name, _, shape in folder.facts()}
    planned = {part.name: part.shape for w in output.plan.weights for part in w.tensors}
    told = belongings.names(planned, found, _read(output.folder / "config.json") or {})
    return tuple(told + [words for _, words in causes(looked_at(output, base, folder))])


def surroundings(output: Output) -> belongings.Told:
    """Config and tokenizer of a merge that somebody else made, against what they should be."""
    facts = list(Folder(output.folder).facts())
    shapes = {name: shape for name, _, shape in facts}
    files = {path.name for path in output.folder.iterdir()}
    wanted = edited(output.merged.config.read(), output.merged.config_edits)
    found = _read(output.folder / "config.json") or {}
    told = belongings.configs(wanted, found, shapes, files)
    told.faults.extend(belongings.retied(found, _same_heads(output, shapes)))
    side = chosen(output.merged.side_files, _tokenizer(output.adapter))
    more = belongings.tokenizers(
        _side(side, "tokenizer.json"),
        _read(output.folder / "tokenizer.json"),
        (any(f.has_template for f in side), _has_template(output.folder)),
    )
    return belongings.Told([*told.faults, *more.faults], [*told.notes, *more.notes])


def belong(output: Output) -> list[Gate]:
    """A gate on what stands around the weights of a merge made earlier."""
    if output.statistics:
        return []
    wanted = "what base and adapter say"
    if faults := surroundings(output).faults:
        return [Gate("config", Status.failed, "; ".join(faults), wanted)]
    return [Gate("config", Status.passed, "config and tokenizer fit the weights", wanted)]


def _same_heads(output: Output, shapes: dict[str, tuple[int, ...]]) -> bool | None:
    if not all(name in shapes for name in _HEADS):
        return None
    if shapes[_HEADS[0]] != shapes[_HEADS[1]]:
        return False
    folder, rows = Folder(output.folder), min(shapes[_HEADS[0]][0], 256)
    head, embeddings = (folder.rows(name, 0, rows) for name in _HEADS)
    return bool((head == embeddings).all())


def _tokenizer(adapter: Adapter) -> tuple[SideFile, ...]:
    return next((p.side_files for p in adapter.parts if brings_tokenizer(p.side_files)), ())


def _side(files: list[SideFile], name: str) -> dict[str, Any]:
    path = next((getattr(f, "path", None) for f in files if getattr(f, "name", "") == name), None)
    return (_read(path) if path else None) or {}


def _has_template(folder: Path) -> bool:
    known = _read(folder / "tokenizer_config.json") or {}
    return bool(known.get("chat_template")) or any(folder.glob("chat_template*"))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON table; None where there is none that can be read."""
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None
