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
    """What a sweep keeps; what it runs over, in a recipe; and the KL ratio that is near enough.

    With `under` the best is the smallest that is near enough, and where one key with numbers is swept,
    bisection finds it: larger numbers are taken to be nearer.
    """

    keep: Keep = Keep.all
    over: Any = None
    under: float | None = None


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
        return f"{value:.4f}" if self.key in ("retained", "captured", "loss") else f"{value:.2g}"


CRITERIA = (
    Criterion("ratio", "KL ratio"),
    Criterion("kl", "KL"),
    Criterion("loss", "loss"),
    Criterion("captured", "captured", most=True),
    Criterion("retained", "rounding kept", most=True),
    Criterion("size", "size"),
    Criterion("seconds", "time"),
    Criterion("memory", "memory"),
)


def row(run: str, report: Report | None, error: str | None, link: str = "") -> Row:
    """The line of a run that gave this report, or this error, or both: a refused result has figures too."""
    if report is None:
        return Row(run, "failed" if error else "planned", error or "")
    kept, figures = retained(report.weights), report.logits or _extracted(report, "logits")
    perplexity = figures.get("perplexity_merged", figures.get("perplexity_extracted"))
    values = {
        "size": float(report.save.get("bytes", report.plan.disk)),
        "seconds": report.save.get("seconds"),
        "memory": float(report.plan.peak_memory),
        "ratio": figures.get("ratio"),
        "kl": figures.get("kl_mean", figures.get("kl_finetune_extracted")),
        "loss": log(perplexity) if perplexity else None,
        "captured": captured(report),
        "retained": kept["mean"] if kept else None,
    }
    result = "refused" if not report.passed else "verified" if report.gates else "not verified"
    failed = [f"{g.name}: {g.seen}" for g in report.gates if g.status is Status.failed]
    known = {key: float(value) for key, value in values.items() if value is not None}
    return Row(run, result, failed[0] if failed else "", known, link)


def _extracted(report: Report, what: str) -> Mapping[str, Any]:
    """What verification saw of an adapter that was extracted: it is compared with the fine-tune."""
    return (report.extraction or {}).get(what) or {}


def captured(report: Report) -> float | None:
    """The share of the difference's energy, over all weights, that an extracted adapter holds."""
    weights = [w for w in _extracted(report, "weights").values() if "energy" in w and "captured" in w]
    energy = sum(w["energy"] for w in weights)
    return sum(w["energy"] * w["captured"] for w in weights) / energy if energy else None


def bests(rows: Sequence[Row]) -> dict[str, set[str]]:
    """For each criterion that tells sound runs apart, the runs that are best by it."""
    found = {}
    for criterion in CRITERIA:
        known = {r.run: r.values[criterion.key] for r in rows if r.sound and criterion.key in r.values}
        if len(known) > 1 and len(set(known.values())) > 1:
            best = (max if criterion.most else min)(known.values())
            found[criterion.key] = {run for run, value in known.items() if value == best}
    return found


def best(rows: Sequence[Row], under: float | None = None) -> Row | None:
    """The run to keep: least KL ratio, else most of the delta kept, else the smallest.

    Given a ratio that is near enough, the smallest of those that have it, if any do.
    """
    none = float("inf")

    def rank(r: Row) -> tuple[float, ...]:
        ratio, size = r.values.get("ratio", none), r.values.get("size", none)
        if under is not None and ratio <= under:
            return (0, size, ratio)
        return (1, ratio, -r.values.get("retained", -none), size)

    return min((r for r in rows if r.sound), key=rank, default=None)


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
        told.append({"run": r.run, "result": r.result, **{c.key: cells.get(c.key, "") for c in shown}})
    return told


def reasons(rows: Sequence[Row]) -> list[str]:
    """What came in the way of each run that gave no result that stands."""
    return [f"{r.run} {r.result}: {r.reason}" for r in _sorted(rows) if r.reason]


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


def as_page(rows: Sequence[Row], settings: Mapping[str, Any], under: float | None = None) -> str:
    """sweep.html: verdict, table, chart, and what failed."""
    sound = [r for r in rows if r.sound]
    marked = bests(rows)
    title = f"{len(rows)} runs"
    words = [f"{len(sound)} of {len(rows)} runs gave a result that stands.", *verdict(rows, under)]
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
    told = "Time is that of making the output; verification shares what it can between the runs."
    parts = [head, section("Leaderboard", table(columns, cells, "wide"), element("p", told))]
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


def verdict(rows: Sequence[Row], under: float | None) -> list[str]:
    """Which run is best, and by what, in a sentence; none where no run is sound."""
    chosen = best(rows, under)
    if chosen is None:
        return []
    ratio = chosen.values.get("ratio")
    if ratio is None:
        return [f"Best: {chosen.run}."]
    if under is None:
        return [f"Best: {chosen.run}, by its KL ratio."]
    if ratio <= under:
        return [f"Best: {chosen.run}, the smallest whose KL ratio is at most {under:g}."]
    return [f"No run has a KL ratio of at most {under:g}; {chosen.run} comes nearest."]


def _both(r: Row) -> bool:
    return r.sound and {"size", "ratio"} <= r.values.keys()


def _cell(r: Row, criterion: Criterion, marked: Mapping[str, set[str]]) -> Markup | str:
    if criterion.key not in r.values:
        return ""
    shown = criterion.show(r.values[criterion.key])
    return element("span", shown, class_="best") if r.run in marked.get(criterion.key, ()) else shown
