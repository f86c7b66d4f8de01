"""report.html: the report as a page, in one file that needs no network and runs no script."""

from __future__ import annotations

from html import escape
from statistics import median

from pipeline.ground.charts import Chart, Plot, plotted
from pipeline.ground.html_extraction import extraction_charts, extraction_section
from pipeline.ground.html_layers import layers_charts, layers_section
from pipeline.ground.html_logits import answers_section, logits_charts, logits_section
from pipeline.ground.html_record import record_section, sources_section
from pipeline.ground.html_weights import weight_charts, weights_section
from pipeline.ground.markup import Column, Markup, element, page, section, table
from pipeline.ground.report import Action, Report, Status, retained, unique
from pipeline.ground.units import show_bytes, show_seconds, show_ulps


def report_page(report: Report) -> str:
    """The page: verdict first, then what was merged into what, the proof, and the record."""
    parts = [
        _verdict(report),
        _figures(report),
        sources_section(report),
        _gates(report),
        weights_section(report.weights),
        layers_section(report.weights),
        extraction_section(report.extraction),
        logits_section(report.logits),
        answers_section(report.answers),
        _findings(report),
        record_section(report),
    ]
    return page(f"{report.word}: {_title(report)}", *(part for part in parts if part))


def report_frame(report: Report) -> str:
    """The page as a frame within another one, as a notebook shows it."""
    style = "width: 100%; height: 44rem; border: 0"
    return f'<iframe srcdoc="{escape(report_page(report))}" sandbox="" style="{style}"></iframe>'


def plots(report: Report) -> dict[str, Plot]:
    """The charts of the page that can be drawn here, by name."""
    charts: list[Chart] = [
        *weight_charts(report.weights),
        *layers_charts(report.weights),
        *extraction_charts(report.extraction),
        *logits_charts(report.logits),
    ]
    return plotted(charts)


def _title(report: Report) -> str:
    plan = report.plan
    if _is_adapter(report):
        return f"{plan.adapter} as an adapter for {plan.base}"
    return f"{plan.adapter} merged into {plan.base}"


def _is_adapter(report: Report) -> bool:
    """Whether the output is an adapter, no merged model."""
    return all(weight.action in (Action.extracted, Action.saved) for weight in report.plan.weights)


def _verdict(report: Report) -> Markup:
    failed = [gate for gate in report.gates if gate.status is Status.failed]
    skipped = [gate for gate in report.gates if gate.status is Status.skipped]
    kind = "failed" if failed else "passed" if report.gates else "open"
    said: list[object] = [
        (element("b", gate.name), f": {gate.seen}; wanted {gate.wanted}.") for gate in failed
    ]
    if not failed and report.gates:
        count = f"{len(report.gates) - len(skipped)} of {len(report.gates)} gates passed"
        said = [f"{count}, {len(skipped)} skipped." if skipped else f"{count}."]
    if report.reservation:
        kind = "lost"
        said.insert(0, element("b", f"{report.reservation[0].upper()}{report.reservation[1:]}."))
    if not report.gates:
        said = ["Nothing was checked."]
    said = [*((element("b", "Likely cause"), f": {cause}.") for cause in report.causes), *said]
    return element(
        "header",
        element("b", report.word, class_="word"),
        element("h1", _title(report)),
        *(element("p", *(part if isinstance(part, tuple) else (part,))) for part in said),
        class_=f"verdict {kind}",
    )


def _figures(report: Report) -> Markup:
    plan, kept, logits = report.plan, retained(report.weights), report.logits
    worst = [w["worst_ulp"] for w in report.weights.values() if w.get("worst_ulp") is not None]
    if _is_adapter(report):
        weights = (report.extraction or {}).get("weights", {}).values()
        energy = [w for w in weights if w.get("energy")]
        total = sum(w["energy"] for w in energy)
        cells = [("weights changed", str(len(plan.weights))), ("stored as", plan.dtype)]
        if total:
            held = sum(w["captured"] * w["energy"] for w in energy) / total
            cells.append(("of the difference is held", f"{held:.2%}"))
        if answered := [w["outputs_captured"] for w in weights if w.get("outputs_captured") is not None]:
            cells.append(("of the outputs' change is held", f"{sum(answered) / len(answered):.2%}"))
        logits = (report.extraction or {}).get("logits")
    else:
        changed = sum(w.action in (Action.merged, Action.saved) for w in plan.weights)
        stored = f"{plan.quantized} and {plan.dtype}" if plan.quantized else plan.dtype
        cells = [("weights merged", f"{changed} of {len(plan.weights)}"), ("stored as", stored)]
    if kept:
        cells.append(("of the delta survives", f"{kept['mean']:.2%}"))
    if noise := [w["noise"] for w in report.weights.values() if w.get("noise") is not None]:
        cells.append(("error of codes, in deltas", f"{median(noise):.3g}"))
    if worst:
        cells.append(("worst rounding", show_ulps(max(worst))))
    if logits:
        cells.append(("KL ratio", f"{logits['ratio']:.2g}"))
        cells.append(("same top token", f"{logits['top1_agreement']:.2%}"))
    if report.save:
        cells.append(("written", show_bytes(report.save["bytes"])))
        cells.append(("made in", show_seconds(report.save["seconds"])))
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


def _findings(report: Report) -> Markup | None:
    found = unique(report.plan.findings, report.findings)
    return section("Notes", element("ul", *(element("li", f.text) for f in found))) if found else None
