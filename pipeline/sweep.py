"""A sweep: its axes as a recipe gives them, what stays on disk, and the leaderboard at its end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.arguments import quoted
from pipeline.ground.leaderboard import Keep, Row, as_csv, as_page, best
from pipeline.ground.workplace import rejected

_REPORTS = ("merge.json", "report.json", "report.html")  # what stays of an output that goes


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its line, and the folder that it was to make."""

    row: Row
    output: Path | None = None


def overrides(axes: Mapping[str, Sequence[Any]], given: Sequence[str]) -> list[str]:
    """The axes of a recipe as arguments for Hydra; a key that the command line gives is no axis."""
    keys = {argument.partition("=")[0] for argument in given}
    over = {key: values for key, values in axes.items() if key not in keys}
    return [f"{key}={','.join(map(_value, values))}" for key, values in over.items()]


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else quoted(str(value))


def thin(runs: Sequence[Run], keep: Keep) -> None:
    """Removes all but the reports of outputs that are not to stay, as soon as they are known not to."""
    if keep is Keep.all:
        return
    chosen = best([run.row for run in runs]) if keep is Keep.best else None
    for run in runs:
        if run.output is not None and (chosen is None or run.row.run != chosen.run):
            for folder in (run.output, rejected(run.output)):
                _leave_reports(folder)


def _leave_reports(folder: Path) -> None:
    if not folder.is_dir() or not (folder / "report.json").is_file():
        return
    for path in folder.iterdir():
        if path.name not in _REPORTS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def finish(runs: Sequence[Run], folder: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """Writes sweep.html and sweep.csv into the sweep's folder, if any run has made it."""
    if not any(run.output for run in runs):
        return
    rows = [run.row for run in runs]
    (folder / "sweep.html").write_text(as_page(rows, common(settings)), "utf-8")
    (folder / "sweep.csv").write_text(as_csv(rows), "utf-8")


def common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all of these tables, at every depth."""
    found: dict[str, Any] = {}
    for key, value in settings[0].items() if settings else ():
        others = [table.get(key) for table in settings]
        if all(isinstance(other, Mapping) for other in others):
            found[key] = common([other for other in others if isinstance(other, Mapping)])
        elif all(other == value for other in others):
            found[key] = value
    return found
