"""A merge that was refused, looked at once more: what likely went wrong, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.ground import belongings
from pipeline.ground.causes import causes
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.diagnosis import Sample, Scaling
from pipeline.ground.folder import Folder
from pipeline.ground.model_config import edited
from pipeline.ground.report import Gate, Status
from pipeline.ground.sidefiles import SideFile, brings_tokenizer, chosen
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.weight import Adapter, Checkpoint, Output, Weight

_ELEMENTS = 1 << 15  # looked at in each weight
_MOST = 512  # weights looked at
_EXPERTS = 64  # experts of a fused weight looked at
_FLOATS = ("F64", "F32", "BF16", "F16")
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")


def diagnose(output: Output, base: Checkpoint[Weight]) -> tuple[str, ...]:
    """The likely causes of a failed gate, the gravest first; empty where nothing known fits."""
    folder = Folder(output.folder)
    facts = list(folder.facts())
    found = {name: shape for name, _, shape in facts}
    planned = {part.name: part.shape for w in output.plan.weights for part in w.tensors}
    told = belongings.names(planned, found, _read(output.folder / "config.json") or {})
    dtypes = {name: dtype for name, dtype, shape in facts if dtype in _FLOATS and shape == planned.get(name)}
    told += [words for _, words in causes(_samples(output, base, folder, dtypes))]
    return tuple(told)


def _samples(
    output: Output, base: Checkpoint[Weight], folder: Folder, dtypes: Mapping[str, str]
) -> Iterator[Sample]:
    """The same rows of weights that differ in a number alone, so that they can be told from each other."""
    bases = {weight.name: weight for weight in base.weights}
    weights = [w for w in output.merged.weights if w.name in dtypes and w.num_rows and w.num_columns]
    changed = [w for w in weights if isinstance(w, Merged | FromAdapter)]
    others = [w for w in weights if not isinstance(w, Merged | FromAdapter)]
    for weight in (*_ends(changed), *_ends(others)):
        before = bases.get(weight.name)
        if isinstance(weight, FromAdapter) and (before is None or before.shape != weight.shape):
            continue
        yield from _of(weight, before or weight, output, folder, dtypes[weight.name])


def _ends(weights: Sequence[Weight]) -> Sequence[Weight]:
    half = _MOST // 2
    return weights if len(weights) <= _MOST else [*weights[:half], *weights[-half:]]


def _of(weight: Weight, before: Weight, output: Output, folder: Folder, dtype: str) -> Iterator[Sample]:
    wide = replace(weight, arithmetic="F64") if isinstance(weight, Merged) else weight
    with wide.open("cpu") as tiles, before.open("cpu") as bases:
        for name, start, stop in _places(weight):
            tile = tiles(start, stop)
            if isinstance(weight, FromAdapter):
                W = bases(start, stop).value.double()
                delta = tile.value.double() - W
            else:
                W = tile.base.double()
                delta = tile.value.double() - W if isinstance(weight, Merged) else None
            stored = folder.rows(weight.name, start, stop).double().view(W.shape)
            whole = stop - start == weight.num_rows
            yield Sample(name, W, delta, stored, dtype, _scaling(weight, output), whole)


def _places(weight: Weight) -> list[tuple[str, int, int]]:
    """Rows to look at: the middle of a matrix, the first rows of each expert of a fused weight."""
    grain, rows = weight.grain, weight.num_rows
    if len(weight.shape) == 3 and weight.shape[1] % grain == 0:
        each = weight.shape[1]
        count = min(max(_ELEMENTS // 4 // weight.num_columns // grain, 1) * grain, each)
        return [(f"{weight.name}[{e}]", e * each, e * each + count) for e in range(weight.shape[0])][
            :_EXPERTS
        ]
    count = min(max(_ELEMENTS // weight.num_columns // grain, 1) * grain, rows)
    start = (rows - count) // 2 // grain * grain
    return [(weight.name, start, min(start + count, rows))]


def _scaling(weight: Weight, output: Output) -> Scaling | None:
    """What the scale of a weight with one plain LoRA is made of."""
    if not isinstance(weight, Merged) or len(weight.placed) != 1:
        return None
    placed = weight.placed[0]
    config = output.adapter.parts[placed.part].config
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(placed.delta, Lora) or not isinstance(alpha, int | float) or not isinstance(rank, int):
        return None
    stabilised, own = bool(config.get("use_rslora")), placed.delta
    told = own.scale * (own.rank**0.5 if stabilised else own.rank)
    return Scaling(told, own.rank, stabilised, float(alpha), rank) if told and alpha and rank else None


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


def _same_heads(output: Output, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
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
