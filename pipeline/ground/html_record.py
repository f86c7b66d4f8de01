"""The parts of report.html that say what went in and came out: origins, hashes, recipe, versions, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.ground.markup import Column, Markup, element, section, table
from pipeline.ground.provenance import digests, origins
from pipeline.ground.report import Report
from pipeline.ground.units import show_bytes, show_seconds

_UNFOLDED = 3  # files whose hashes stand in the open
_ROLES = {"base": "base", "finetune": "fine-tune", "adapter": "adapter", "output": "output"}
File = Mapping[str, Any]


def sources_section(report: Report) -> Markup:
    """What went in and what came out, each by its name, its commit and the hashes of its files."""
    plan, inputs = report.plan, digests(report.manifest.get("inputs"), owned=True)
    told = origins(report.manifest) or [
        {"of": "base", "name": plan.base},
        {"of": "adapter", "name": plan.adapter},
    ]
    outputs = digests(report.manifest.get("outputs"))
    rows = []
    for role, label in _ROLES.items():
        names = [_origin(origin) for origin in told if origin["of"] == role]
        files = [file for file in inputs if file["of"] == role]
        if role == "output":
            names, files = [plan.output], outputs
        if names:
            rows.append((label, element("div", element("b", "; ".join(names)), *_files(files))))
    return section("What went in, what came out", table([Column(""), Column("")], rows, "sources"))


def _origin(facts: Mapping[str, Any]) -> str:
    commit = f" at {facts['commit']}" if facts.get("commit") else ""
    weight = f", weight {facts['weight']:g}" if facts.get("weight", 1) != 1 else ""
    return f"{facts.get('repo') or facts['name']}{commit}{weight}"


def _files(files: Sequence[File]) -> list[Markup]:
    """Weights first and in the open where they are few, all others folded."""
    weights = [file for file in files if file["name"].endswith((".safetensors", ".gguf"))]
    few = weights if len(weights) <= _UNFOLDED else []
    others = [file for file in files if file not in few]
    shown = [_file(file) for file in few]
    if others:
        size = show_bytes(sum(file["num_bytes"] for file in others))
        more = f"{len(others)} {'more ' if few else ''}file{'s' * (len(others) > 1)}, {size}"
        shown.append(element("details", element("summary", more), *map(_file, others)))
    return shown


def _file(file: File) -> Markup:
    name, size = element("span", file["name"]), element("span", show_bytes(file["num_bytes"]))
    return element("div", name, size, element("code", file["sha256"]), class_="file")


def record_section(report: Report) -> Markup:
    """How it was done, with what, and how long it took."""
    plan, save = report.plan, report.save
    actions = ", ".join(f"{n} {action.name} ({action.value})" for action, n in plan.count().items())
    rows: list[tuple[object, object]] = [
        ("weights", actions),
        ("arithmetic", f"in {plan.merge_dtype}, {plan.stored}"),
    ]
    if report.stages:
        rows.append(("stages", ", ".join(f"{slot} {stage}" for slot, stage in report.stages.items())))
    if save:
        rows.append(("making it took", show_seconds(save["seconds"])))
        rows.append(("peak memory", show_bytes(save["peak_memory"])))
    if report.gates:
        rows.append(("verifying took", show_seconds(report.seconds)))
    if report.versions:
        rows.append(("versions", ", ".join(f"{name} {found}" for name, found in report.versions.items())))
    parts: list[object] = [table([Column(""), Column("")], rows)]
    if report.request:
        parts += [element("h3", "Recipe"), element("pre", as_yaml(report.request))]
    return section("Record", *parts)


def as_yaml(value: Any, indent: str = "") -> str:
    """Nested tables as people write them in a recipe."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            lines += [f"{indent}{key}:", as_yaml(inner, indent + "  ")] if inner else []
        else:
            lines.append(f"{indent}{key}: {_scalar(inner)}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_scalar(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
