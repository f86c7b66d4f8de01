"""What is in an adapter, for people: a sentence, and a line for each sort of module it changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from pipeline.ground.audit import BIASES, Audit, audit
from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.lora_family import NESTED
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.dtypes import num_bytes
from pipeline.ground.errors import Refused
from pipeline.ground.manifest import published
from pipeline.ground.report import AdapterContents, ContentsRow
from pipeline.ground.target_rules import wrong_fields
from pipeline.ground.targets import unkept
from pipeline.ground.units import show_bytes
from pipeline.weight import Adapter, Checkpoint, Part, Weight


def contents(adapter: Adapter) -> tuple[AdapterContents, ...]:
    """One for each adapter."""
    return tuple(_contents(part) for part in adapter.parts)


def _contents(part: Part) -> AdapterContents:
    rows: dict[tuple[str, str], list[Delta]] = defaultdict(list)
    for delta in part.deltas:
        rows[_sort(delta), delta.describe(1.0)].append(delta)
    return AdapterContents(
        name=published(part.origin).name,
        words=". ".join(_words(part)) + ".",
        rows=tuple(_row(sort, kind, deltas) for (sort, kind), deltas in rows.items()),
    )


def _words(part: Part) -> Iterator[str]:
    config = part.config
    entries = {entry.name: entry for delta in part.deltas for entry in delta.entries}.values()
    size = show_bytes(sum(num_bytes(e.dtype, e.shape) or 0 for e in entries))
    count = sum(prod(e.shape) for e in entries)
    wrote = f", written by PEFT {config['peft_version']}" if config.get("peft_version") else ""
    yield f"{config.get('peft_type')} for {config.get('task_type') or 'no stated task'}{wrote}"
    if trained_on := config.get("base_model_name_or_path"):
        yield f"Trained on {trained_on}"
    dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
    yield f"{len({d.module for d in part.deltas})} modules, {count:,} parameters in {dtypes}, {size}"
    if part.weight != 1:
        yield f"Taken {part.weight:g} times"


def _sort(delta: Delta) -> str:
    """The module's last name and its parameter, for those that are alike in all layers."""
    name = delta.module.rpartition(".")[2]
    if name.isdigit():
        name = ".".join(delta.module.split(".")[-2:])
    return name if delta.parameter == "weight" else f"{name}.{delta.parameter}"


def _row(sort: str, kind: str, deltas: Sequence[Delta]) -> ContentsRow:
    entries = [entry for delta in deltas for entry in delta.entries]
    shapes = list(dict.fromkeys("x".join("?" if n < 0 else str(n) for n in d.shape) for d in deltas))
    return ContentsRow(
        modules=sort,
        count=len(deltas),
        kind=kind,
        shapes=", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else ""),
        parameters=sum(prod(entry.shape) for entry in entries),
        num_bytes=sum(num_bytes(entry.dtype, entry.shape) or 0 for entry in entries),
    )


def promises(base: Checkpoint[Weight], adapter: Adapter, renames: Mapping[str, str]) -> Iterator[str]:
    """What of the adapters' promises is uncertain, for findings; Refused for what they break."""
    shapes = {weight.name: weight.shape for weight in base.weights}
    layers = _num_layers(base)
    wrong: list[str] = []
    findings: list[str] = []
    for part in adapter.parts:
        name = published(part.origin).name
        modules = {delta.module for delta in part.deltas if not _is_beside(delta)}
        refusals, found = unkept(part.config, modules, shapes, layers, renames)
        if not wrong_fields(part.config):
            found_out = _audited(part, shapes, layers, renames)
            promised, held = found_out.kinds.get(BIASES, (0, 0))
            if (refusals or held < promised) and (lacking := found_out.sentence()):
                refusals.append(lacking)
        wrong += [f"adapter: {name} {sentence}" for sentence in refusals]
        findings += [f"{name} {sentence}" for sentence in found]
    if wrong:
        raise Refused(*wrong)
    yield from findings


def audited(merged: Checkpoint[Weight], adapter: Adapter) -> str:
    """Trained parameters by kind: what the files hold of what config and base call for."""
    shapes = {weight.name: weight.shape for weight in merged.weights}
    totals: dict[str, tuple[int, int]] = {}
    for part in adapter.parts:
        if wrong_fields(part.config):
            continue
        for kind, (promised, held) in _audited(part, shapes, _num_layers(merged), {}).kinds.items():
            before = totals.get(kind, (0, 0))
            totals[kind] = (before[0] + promised, before[1] + held)
    told = [(kind, held, promised) for kind, (promised, held) in totals.items()]
    return ", ".join(
        f"{kind} {held:,}" + (f" of {promised:,}" if 0 < promised != held else "")
        for kind, held, promised in told
    )


def _is_beside(delta: Delta) -> bool:
    """Whether it is what PEFT saves beside the trained: copies of the base's weights, biases."""
    return isinstance(delta, Saved) and (NESTED in delta.entry.name or delta.parameter == "bias")


def _audited(
    part: Part,
    shapes: Mapping[str, tuple[int, ...]],
    layers: int | None,
    renames: Mapping[str, str],
) -> Audit:
    held = {entry.name: entry.shape for delta in part.deltas for entry in delta.entries}
    return audit(part.config, held, shapes, layers, renames)


def _num_layers(base: Checkpoint[Weight]) -> int | None:
    config = base.config.read()
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(found := level.get(key), int):
                return found
    return None
