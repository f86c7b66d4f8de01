"""Plans and reports as people read them in a terminal."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from pipeline.ground.progress import is_quiet
from pipeline.ground.report import Action, AdapterContents, Plan, Report, Status, retained, unique
from pipeline.ground.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from rich.console import Console


P = ParamSpec("P")


def console() -> Console:
    """Standard output; plain text where it is no terminal, and nowhere where nothing is to be shown."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=is_quiet(), force_jupyter=False)


def _while_someone_listens(show: Callable[P, None]) -> Callable[P, None]:
    """A pipe that was closed ends the showing, not the run."""

    @wraps(show)
    def showing(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            show(*arguments, **named)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for whatever is still said

    return showing


@_while_someone_listens
def show_plan(plan: Plan, every_weight: bool = False) -> None:
    """The plan; with `every_weight` a line for each that changes."""
    out = console()
    counts, deltas = plan.count(), Counter(delta for w in plan.weights for delta in w.deltas)
    lines = [
        ("base", plan.base),
        ("adapter", f"{plan.adapter}: " + ", ".join(f"{n} x {kind}" for kind, n in deltas.most_common(6))),
        *([("trained", plan.trained)] if plan.trained else []),
        ("weights", ", ".join(f"{n} {action.name} ({action.value})" for action, n in counts.items())),
        ("arithmetic", f"in {plan.merge_dtype}, {plan.stored}"),
    ]
    if plan.output and plan.disk:
        files = f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
        lines.append(("output", f"{plan.output}: {show_bytes(plan.disk)} in {files}"))
        lines.append(("memory", f"at most {show_bytes(plan.peak_memory)} beyond the libraries"))
    _show(out, "plan", lines)
    if every_weight:
        for adapter in plan.contents:
            _show_contents(out, adapter)
        for w in plan.weights:
            if w.action is not Action.copied:
                what = ", ".join(w.deltas) or w.action.name
                what += "" if w.base_shift is None else f"; NF4 is {w.base_shift:.3g} times the delta away"
                out.print(f"  {w.name} {list(w.shape)} {w.source} -> {w.dtype}: {what}", markup=False)
    for finding in plan.findings:
        out.print(f"  note: {finding.text}", markup=False)


def _show_contents(out: Console, adapter: AdapterContents) -> None:
    from rich.table import Table

    out.print(f"adapter {adapter.name}", markup=False)
    out.print(f"  {adapter.words}", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("  modules")
    table.add_column("count", justify="right")
    table.add_column("what")
    table.add_column("weight")
    table.add_column("parameters", justify="right")
    table.add_column("size", justify="right")
    for row in adapter.rows:
        cells = (row.count, row.kind, row.shapes, f"{row.parameters:,}", show_bytes(row.num_bytes))
        table.add_row(f"  {row.modules}", *map(str, cells))
    out.print(table)


@_while_someone_listens
def show_report(report: Report, stands_at: str) -> None:
    """What was done, what verification saw, the answers, and where the result is."""
    out = console()
    save, kept = report.save, retained(report.weights)
    if save:
        rate = show_bytes(save["bytes"] / max(save["seconds"], 1e-9))
        done = f"{show_bytes(save['bytes'])} in {show_seconds(save['seconds'])} ({rate}/s)"
        lines = [("written", f"{done}, peak memory {show_bytes(save['peak_memory'])}")]
        if kept:
            share = f"{kept['mean']:.4f} of the delta on average, at least {kept['least']:.4f}"
            lines.append(("rounding kept", share))
        _show(out, "merged", lines)
    marks = {Status.passed: "ok", Status.failed: "FAILED", Status.skipped: "skipped"}
    if report.gates:
        but = f": {report.reservation}" if report.reservation else ""
        out.print(f"{report.word.lower()} in {show_seconds(report.seconds)}{but}", markup=False)
        for gate in report.gates:
            wanted = "" if gate.status is Status.passed else f" (wanted: {gate.wanted})"
            out.print(f"  {marks[gate.status]:8}{gate.name}: {gate.seen}{wanted}", markup=False)
    for cause in report.causes:
        out.print(f"  likely cause: {cause}", markup=False)
    for finding in unique(report.plan.findings, report.findings):
        out.print(f"  note: {finding.text}", markup=False)
    for said in report.answers or ():
        _show(out, "answers", [(key, " ".join(text.split())) for key, text in said.items()])
    out.print(stands_at, markup=False)


@_while_someone_listens
def show_sweep(lines: list[dict[str, str]], sentences: list[str]) -> None:
    """The leaderboard, heads first, and what is to be said of it."""
    widths = {key: max(len(line[key]) for line in lines) + 2 for key in lines[0]}
    for line in lines:
        told = "".join(f"{line[key]:{width}}" for key, width in widths.items())
        console().print(told.rstrip(), markup=False)
    for sentence in sentences:
        console().print(sentence, markup=False)


def _show(out: Console, title: str, lines: list[tuple[str, str]]) -> None:
    out.print(title)
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        out.print(f"  {name:{width}}{text}", markup=False)
