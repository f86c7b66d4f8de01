"""The runs of a sweep side by side: a line each, the best by each criterion marked, failures among them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from io import StringIO
from math import log
from typing import Any
from urllib.parse import quote

from pipeline.ground import charts
from pipeline.ground.html_record import as_yaml
from pipeline.ground.markup import Column, Markup, element, figure, page, section, table
from pipeline.ground.report import Report, Status, retained
from pipeline.ground.units import show_bytes, show_seconds


class Keep(Enum):
    """Which outputs of a sweep stay; their reports always do."""

    all = "all"
    best = "best"
    none = "none"


@dataclass
class Sweep:
    """What a sweep keeps, and, in a recipe, what it runs over."""

    keep: Keep = Keep.all
    over: Any = None


@dataclass(frozen=True)
class Row:
    """One run: what became of it, and its figures as far as there are any."""

    run: str
    result: str  # verified, not verified, planned, refused, failed
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    link: str = ""  # its report's page, from the sweep's folder

    @property
    def sound(self) -> bool:
        return self.result in ("verified", "not verified")


@dataclass(frozen=True)
class Criterion:
    """Something that runs are compared by; the least is best unless `most`."""

    key: str
    head: str
    most: bool = False

    def show(self, value: float) -> str:
        if self.key in ("size", "memory"):
            return show_bytes(value)
        if self.key == "seconds":
            return show_seconds(value)
        return f"{value:.4f}" if self.key in ("retained", "loss") else f"{value:.2g}"


CRITERIA = (
    Criterion("ratio", "KL ratio"),
    Criterion("kl", "KL"),
    Criterion("loss", "loss"),
    Criterion("retained", "rounding kept", most=True),
    Criterion("size", "size"),
    Criterion("seconds", "time"),
    Criterion("memory", "memory"),
)


def row(run: str, report: Report | None, error: str | None, link: str = "") -> Row:
    """The line of a run that gave this report, or this error, or both: a refused result has figures too."""
    if report is None:
        return Row(run, "failed" if error else "planned", error or "")
    kept, figures = retained(report.weights), report.logits or report_logits(report) or {}
    values = {
        "size": float(report.plan.disk),
        "seconds": report.save.get("seconds", 0.0) + report.seconds,
        "memory": float(report.plan.peak_memory),
        "ratio": figures.get("ratio"),
        "kl": figures.get("kl_mean"),
        "loss": log(figures["perplexity_merged"]) if figures.get("perplexity_merged") else None,
        "retained": kept["mean"] if kept else None,
    }
    result = "refused" if not report.passed else "verified" if report.gates else "not verified"
    failed = [f"{g.name}: {g.seen}" for g in report.gates if g.status is Status.failed]
    known = {key: float(value) for key, value in values.items() if value is not None}
    return Row(run, result, failed[0] if failed else "", known, link)


def report_logits(report: Report) -> Mapping[str, Any] | None:
    """The figures of an extracted adapter, which is compared with the fine-tune."""
    found = getattr(report, "extraction", None)
    return found.get("logits") if found else None


def bests(rows: Sequence[Row]) -> dict[str, set[str]]:
    """For each criterion that tells sound runs apart, the runs that are best by it."""
    found = {}
    for criterion in CRITERIA:
        known = {r.run: r.values[criterion.key] for r in rows if r.sound and criterion.key in r.values}
        if len(known) > 1 and len(set(known.values())) > 1:
            best = (max if criterion.most else min)(known.values())
            found[criterion.key] = {run for run, value in known.items() if value == best}
    return found


def best(rows: Sequence[Row]) -> Row | None:
    """The run to keep: least KL ratio, else most of the delta kept, else the smallest."""
    sound = [r for r in rows if r.sound]
    none = float("inf")
    return min(
        sound,
        key=lambda r: (
            r.values.get("ratio", none),
            -r.values.get("retained", -none),
            r.values.get("size", none),
        ),
        default=None,
    )


def lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The leaderboard for a terminal; a star marks the best of a column."""
    marked = bests(rows)
    shown = [c for c in CRITERIA if any(c.key in r.values for r in rows)]
    heads = {"run": "run", "result": "result", **{c.key: c.head for c in shown}}
    told = [heads]
    for r in _sorted(rows):
        cells = {
            c.key: c.show(r.values[c.key]) + (" *" if r.run in marked.get(c.key, ()) else "")
            for c in shown
            if c.key in r.values
        }
        result = f"{r.result}: {r.reason}" if r.reason else r.result
        told.append({"run": r.run, "result": result, **{c.key: cells.get(c.key, "") for c in shown}})
    return told


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """Sound runs by their KL ratio, then the others."""
    none = float("inf")
    return sorted(rows, key=lambda r: (not r.sound, r.values.get("ratio", none)))


def as_csv(rows: Sequence[Row]) -> str:
    """The leaderboard as CSV: bytes, seconds and nats, empty where there is no figure."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "result", "reason", *(c.key for c in CRITERIA), "best_by"])
    marked = bests(rows)
    for r in _sorted(rows):
        by = " ".join(key for key, runs in marked.items() if r.run in runs)
        values = [repr(r.values[c.key]) if c.key in r.values else "" for c in CRITERIA]
        writer.writerow([_plain(r.run), r.result, _plain(r.reason), *values, by])
    return out.getvalue()


def _plain(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def as_page(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """sweep.html: verdict, table, chart, and what failed."""
    sound = [r for r in rows if r.sound]
    chosen, marked = best(rows), bests(rows)
    title = f"{len(rows)} runs"
    words = [f"{len(sound)} of {len(rows)} runs gave a result that stands."]
    if chosen:
        words.append(f"Best: {chosen.run}" + (", by its KL ratio." if "ratio" in chosen.values else "."))
    head = element(
        "header",
        element("b", "Sweep", class_="word"),
        element("h1", title),
        *(element("p", w) for w in words),
        class_=f"verdict {'passed' if len(sound) == len(rows) else 'failed' if not sound else 'open'}",
    )
    shown = [c for c in CRITERIA if any(c.key in r.values for r in rows)]
    ordered = _sorted(rows)
    cells = [
        (
            str(n),
            element("span", r.result, class_=f"mark {'passed' if r.sound else 'failed'}"),
            element("a", r.run, href=quote(r.link)) if r.link else r.run,
            *(_cell(r, c, marked) for c in shown),
        )
        for n, r in enumerate(ordered, 1)
    ]
    columns = [Column(""), Column("result"), Column("run"), *(Column(c.head, number=True) for c in shown)]
    parts = [head, section("Leaderboard", table(columns, cells, "wide"))]
    known = [
        (str(n), r.values["size"] / 1e6, r.values["ratio"]) for n, r in enumerate(ordered, 1) if _both(r)
    ]
    if len(known) > 1:
        chart = partial(charts.points, known, "size, MB", "KL ratio")
        parts.append(figure("KL ratio against size, runs by their number", charts.drawn("sweep", chart)))
    if failed := [r for r in rows if r.reason]:
        items = [element("li", element("b", r.run), f": {r.reason}") for r in failed]
        parts.append(section("What failed, and why", element("ul", *items)))
    if settings:
        parts.append(section("In all runs", element("pre", as_yaml(settings))))
    return page(f"Sweep: {title}", *parts)


def _both(r: Row) -> bool:
    return r.sound and {"size", "ratio"} <= r.values.keys()


def _cell(r: Row, criterion: Criterion, marked: Mapping[str, set[str]]) -> Markup | str:
    if criterion.key not in r.values:
        return ""
    shown = criterion.show(r.values[criterion.key])
    return element("span", shown, class_="best") if r.run in marked.get(criterion.key, ()) else shown
