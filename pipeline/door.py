"""One request: built, planned, run, published - and what the user is told of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.html import report_page
from pipeline.ground.manifest import NAME, versions, write_json
from pipeline.ground.progress import say
from pipeline.ground.report import Report
from pipeline.ground.terminal import show_plan, show_report
from pipeline.ground.workplace import Workplace
from pipeline.stage import Pipeline


@dataclass(frozen=True)
class Request:
    """A pipeline, and what of the request the stages need not know."""

    pipeline: Pipeline
    settings: Mapping[str, Any]  # for merge.json
    report: Path | None = None
    dry_run: bool = False


def fulfil(request: Request) -> Report | None:
    """Plans, and unless that is all, runs and publishes; Rejected if verification refuses the result."""
    look_only = not request.pipeline.save.needs_output
    _check_report(request.report)
    plan = request.pipeline.plan()
    show_plan(plan, every_weight=look_only)
    if request.dry_run or look_only:
        return None
    if request.pipeline.save.writes:
        return _published(request)
    report = _of(request, request.pipeline.run(), request.pipeline.save.output)
    return _told(report, request)


def _of(request: Request, report: Report, stands_at: Path) -> Report:
    """The report with what was asked for, and where the result stands."""
    return replace(
        report,
        stages=request.pipeline.chosen(),
        request=request.settings,
        versions={name: found for part in versions().values() for name, found in part.items()},
        stands_at=stands_at,
    )


def _check_report(path: Path | None) -> None:
    if path and path.is_dir():
        raise Refused(f"report: '{path}' is a folder; give a file")
    if path and not path.absolute().parent.is_dir():
        raise Refused(f"report: '{path.parent}' is not a folder; give a file in one that exists")
    if path and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise Refused(f"report: '{path}' cannot be written; give another file")


def _published(request: Request) -> Report:
    place = Workplace(request.pipeline.save.output, request.pipeline.extract.resumes)
    try:
        return _made(request, place)
    finally:
        if place.is_kept:
            say(
                f"note: what is done so far stands in '{place.folder}': the same request goes on from there; "
                "to drop it, remove that folder"
            )


def _made(request: Request, place: Workplace) -> Report:
    with place:
        report = _of(request, _run_planned(request.pipeline), place.folder)
        verdict = {gate.name: gate.status.value for gate in report.gates}
        manifest = {k: v for k, v in report.manifest.items() if k != "save"}
        asked = {"stages": report.stages, "request": report.request}
        write_json(place.folder / NAME, {**manifest, **asked, "verified": verdict})
        write_json(place.folder / "report.json", report.as_dict())
        (place.folder / "report.html").write_text(report_page(report), "utf-8")
        report = replace(report, stands_at=place.publish() if report.passed else place.reject())
    return _told(report, request)


def _run_planned(pipeline: Pipeline) -> Report:
    """Runs; what is refused now was not wrong with the request when it was planned."""
    try:
        return pipeline.run()
    except Refused as refusal:
        raise PipelineError(f"the run failed: {refusal}; nothing was published") from refusal


def _told(report: Report, request: Request) -> Report:
    """Writes the report where it is asked for and shows it; Rejected if verification refuses the result."""
    if request.report:
        if request.report.suffix != ".html":
            write_json(request.report, report.as_dict())
        request.report.with_suffix(".html").write_text(report_page(report), "utf-8")
    show_report(report, f"{'done' if report.passed else 'refused'}: {report.stands_at}")
    return report.require()
