"""report.html: the report as a page, in one file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.html_weights import weights_section
from pipeline.ground.markup import Column, Markup, element, figure, page, section, table
from pipeline.ground.report import Action, Report, Status, retained, unique
from pipeline.ground.units import show_bytes, show_seconds


def report_page(report: Report, request: Mapping[str, Any]) -> str:
    """The page: verdict first, then what was merged into what, the proof, and the record."""
    title = f"{report.plan.adapter} merged into {report.plan.base}"
    parts = [
        _verdict(report, title),
        _figures(report),
        _gates(report),
        weights_section(report.weights),
        _logits(report),
        _answers(report),
        _findings(report),
        _record(report, request),
    ]
    return page(f"{_word(report)}: {title}", *(part for part in parts if part))


def _word(report: Report) -> str:
    if not report.passed:
        return "Refused"
    return "Verified" if report.gates else "Not verified"


def _verdict(report: Report, title: str) -> Markup:
    failed = [gate for gate in report.gates if gate.status is Status.failed]
    skipped = [gate for gate in report.gates if gate.status is Status.skipped]
    kind = "failed" if failed else "passed" if report.gates else "open"
    said = [f"{gate.name}: {gate.seen}; wanted {gate.wanted}." for gate in failed]
    if not failed and report.gates:
        said = [f"{len(report.gates) - len(skipped)} of {len(report.gates)} gates passed"]
        said[0] += f", {len(skipped)} skipped." if skipped else "."
    if not report.gates:
        said = ["Nothing was checked."]
    said = [*(f"Likely cause: {cause}." for cause in report.causes), *said]
    return element(
        "header",
        element("b", _word(report), class_="word"),
        element("h1", title),
        *(element("p", sentence) for sentence in said),
        class_=f"verdict {kind}",
    )


def _figures(report: Report) -> Markup:
    plan, kept, logits = report.plan, retained(report.weights), report.logits
    worst = [w["worst_ulp"] for w in report.weights.values() if w.get("worst_ulp") is not None]
    changed = sum(w.action in (Action.merged, Action.saved) for w in plan.weights)
    cells = [("weights merged", f"{changed} of {len(plan.weights)}"), ("stored as", plan.dtype)]
    if kept:
        cells.append(("of the delta survives", f"{kept['mean']:.2%}"))
    if worst:
        cells.append(("worst rounding", f"{max(worst):.4g} ulp"))
    if logits:
        cells += [
            ("KL ratio", f"{logits['ratio']:.2g}"),
            ("same top token", f"{logits['top1_agreement']:.2%}"),
        ]
    if report.save:
        cells += [
            ("written", show_bytes(report.save["bytes"])),
            ("merged in", show_seconds(report.save["seconds"])),
        ]
    if report.gates:
        cells.append(("verified in", show_seconds(report.seconds)))
    return element(
        "dl", *(element("div", element("dt", k), element("dd", v)) for k, v in cells), class_="figures"
    )


def _gates(report: Report) -> Markup | None:
    if not report.gates:
        return None
    marks = {Status.passed: "passed", Status.failed: "FAILED", Status.skipped: "skipped"}
    rows = [
        (g.name, element("span", marks[g.status], class_=f"mark {g.status.value}"), g.seen, g.wanted)
        for g in report.gates
    ]
    heads = [Column("gate"), Column("result"), Column("seen"), Column("wanted")]
    return section("Gates", table(heads, rows, "stack"))


_LOGITS = {
    "kl_adapter_base": "KL(adapter || base), mean",
    "kl_mean": "KL(adapter || merged), mean",
    "kl_median": "median",
    "kl_p99": "99th percentile",
    "kl_p999": "99.9th percentile",
    "kl_max": "largest",
    "kl_floor": "of it, noise of the evaluation itself",
    "ratio": "KL(adapter || merged) / KL(adapter || base)",
    "ratio_interval": "its 95 % interval",
    "top1_agreement": "same top token",
    "top1_interval": "its 95 % interval",
    "rms_probability": "RMS change of a token's probability",
    "perplexity_adapter": "perplexity, adapter",
    "perplexity_merged": "perplexity, merged",
    "perplexity_ratio": "merged / adapter",
    "perplexity_ratio_error": "its standard error",
    "largest_difference": "largest difference of a log-probability",
    "tokens": "tokens",
}


def _logits(report: Report) -> Markup | None:
    figures = report.logits
    if not figures:
        return None
    rows = [(label, _number(figures[key])) for key, label in _LOGITS.items() if figures.get(key) is not None]
    parts: list[object] = [table([Column("nats per token"), Column("", number=True)], rows)]
    if values := figures.get("kl_along"):
        level = (figures["kl_adapter_base"], "what the adapter does, KL(adapter || base)")
        chart = partial(charts.along, values, "along the text", "KL(adapter || merged), nats", level)
        parts.append(
            figure("What the merge changed in the predictions, along the text", charts.drawn("kl", chart))
        )
    return section("The merged model against base + adapter", element("div", *parts, class_="charts"))


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_number, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _answers(report: Report) -> Markup | None:
    if not report.answers:
        return None
    answers = dict(report.answers)
    prompt = answers.pop("prompt", "")
    columns = [element("div", element("b", who), said) for who, said in answers.items()]
    return section(
        "Answers", element("p", prompt, class_="muted"), element("div", *columns, class_="answers")
    )


def _findings(report: Report) -> Markup | None:
    found = unique(report.plan.findings, report.findings)
    return section("Notes", element("ul", *(element("li", f.text) for f in found))) if found else None


def _record(report: Report, request: Mapping[str, Any]) -> Markup:
    plan, manifest = report.plan, report.manifest
    actions = ", ".join(f"{n} {action.name}" for action, n in plan.count().items())
    rows: list[tuple[object, object]] = [
        *(("base", _origin(b, plan.base)) for b in _tables([manifest.get("base")]) or [{}]),
        *(("adapter", _origin(a, plan.adapter)) for a in _tables(manifest.get("adapters")) or [{}]),
        ("weights", actions),
        ("arithmetic", f"in {plan.merge_dtype}, stored as {plan.dtype}"),
    ]
    if report.save:
        rows.append(("peak memory", show_bytes(report.save["peak_memory"])))
    versions = {
        k: v for part in ("tool", "libraries") for t in _tables([manifest.get(part)]) for k, v in t.items()
    }
    rows += [(element("code", name), version) for name, version in versions.items()]
    parts: list[object] = [table([Column(""), Column("")], rows)]
    if request:
        parts += [element("h2", "Recipe"), element("pre", as_yaml(request))]
    for key, label in (("inputs", "What went in"), ("outputs", "What came out")):
        if files := _tables(manifest.get(key)):
            listed = [
                (f.get("name"), show_bytes(float(f.get("num_bytes", 0))), element("code", f.get("sha256")))
                for f in files
            ]
            heads = [Column("file"), Column("size", number=True), Column("SHA-256")]
            summary = element("summary", f"{label}: {len(listed)} files with their hashes")
            parts.append(element("details", summary, table(heads, listed, "wide")))
    return section("Record", *parts)


def _tables(value: Any) -> list[Mapping[str, Any]]:
    """The tables of a list: a manifest that somebody else wrote may hold anything."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []


def _origin(facts: Mapping[str, Any], name: str) -> str:
    commit = f" at {facts['commit']}" if facts.get("commit") else ""
    weight = f", weight {facts['weight']}" if facts.get("weight", 1) != 1 else ""
    return f"{facts.get('repo') or facts.get('name') or name}{commit}{weight}"


def as_yaml(value: Any, indent: str = "") -> str:
    """Nested tables as people write them in a recipe."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            lines += [f"{indent}{key}:", as_yaml(inner, indent + "  ")] if inner else []
        else:
            lines.append(f"{indent}{key}: {inner}")
    return "\n".join(lines)
