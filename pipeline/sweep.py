"""A sweep: its axes as a recipe gives them, what stays on disk, and the leaderboard at its end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from pipeline.arguments import quoted
from pipeline.ground.leaderboard import Keep, Row, Sweep, as_csv, as_page, best
from pipeline.ground.workplace import rejected

_REPORTS = ("merge.json", "report.json", "report.html")  # what stays of an output that goes


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its line, the sweep's folder, and the folder that it has made there."""

    row: Row
    folder: Path
    output: Path | None = None
    status: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    under: float | None = None  # the KL ratio that is near enough
    begun: int = field(default_factory=time.time_ns)


def record(run: Run, scratch: Path) -> None:
    """Tells it to the other processes of the sweep, in place of what was told of it before."""
    folder = scratch / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.row.run}.json"
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(asdict(run), default=str), "utf-8")
    whole.replace(path)


def recorded(scratch: Path) -> list[Run]:
    """All runs that have begun, in that order."""
    found = []
    for path in (scratch / "runs").glob("*.json"):
        told = json.loads(path.read_text("utf-8"))
        told |= {"row": Row(**told["row"]), "folder": Path(told["folder"])}
        found.append(Run(**{**told, "output": Path(told["output"]) if told["output"] else None}))
    return sorted(found, key=lambda run: run.begun)


def near_enough(run: Run) -> bool | None:
    """Whether its KL ratio is one that the sweep is content with; None where it has no ratio."""
    ratio = run.row.values.get("ratio")
    if ratio is None or run.under is None:
        return None
    return run.row.sound and ratio <= run.under


def objective(run: Run) -> float:
    """What a search should make small: the KL ratio, or the size of what is near enough; inf for the rest."""
    if run.under is None:
        return run.row.values.get("ratio", inf) if run.row.sound else inf
    return run.row.values.get("size", inf) if near_enough(run) else inf


def overrides(axes: Mapping[str, Sequence[Any]], given: Sequence[str]) -> list[str]:
    """The axes of a recipe as arguments for Hydra; a key that the command line gives is no axis."""
    keys = {argument.partition("=")[0] for argument in given}
    over = {key: values for key, values in axes.items() if key not in keys}
    return [f"{key}={','.join(map(_value, values))}" for key, values in over.items()]


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else quoted(str(value))


def thin(runs: Sequence[Run], sweep: Sweep) -> None:
    """Removes all but the reports of outputs that are not to stay, as soon as they are known not to."""
    if sweep.keep is Keep.all:
        return
    chosen = best([run.row for run in runs], sweep.under) if sweep.keep is Keep.best else None
    for run in runs:
        if run.output is not None and (chosen is None or run.row.run != chosen.run):
            for folder in (run.output, rejected(run.output)):
                _leave_reports(folder)


def _leave_reports(folder: Path) -> None:
    """Another process of the sweep may be doing the same."""
    if not folder.is_dir() or not (folder / "report.json").is_file():
        return
    for path in folder.iterdir():
        if path.name in _REPORTS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def finish(runs: Sequence[Run]) -> None:
    """Writes sweep.html and sweep.csv into the sweep's folder, if any run has made it."""
    if not any(run.output for run in runs):
        return
    rows, folder = [run.row for run in runs], runs[0].folder
    settings = common([run.settings for run in runs])
    (folder / "sweep.html").write_text(as_page(rows, settings, runs[0].under), "utf-8")
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
