"""What Hydra calls for each composed request: one run, alone or among those of a sweep.

A launcher may call it in another process, on another machine: what a run of a sweep comes to is told in a
file in the sweep's scratch folder, where whoever writes the leaderboard finds it.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline import compose, stage
from pipeline.arguments import OWN_REPORTS, expanded
from pipeline.door import Request, fulfil
from pipeline.ground import reuse
from pipeline.ground.errors import Refused
from pipeline.ground.leaderboard import Row, row
from pipeline.ground.report import Rejected, Report
from pipeline.sweep import Run, objective, record, recorded, thin
from pipeline.telling import failed

_OF_A_MODEL = ("config.json", "adapter_config.json")
_LONGEST = 120  # characters of a folder's name that a swept value may make


def alone(cfg: Any) -> int:
    """The exit status of one run."""
    _, error = _fulfilled(cfg)
    return failed(error) if error else 0


def swept(cfg: Any) -> float:
    """One run of a sweep, which writes below `output`; what a sweeper that searches should make small."""
    from hydra.core.hydra_config import HydraConfig

    stage.load_stages()  # a worker process has seen none of them
    hydra = HydraConfig.get()
    scratch, name = Path(hydra.sweep.dir), folder_name(hydra.job.override_dirname)
    if earlier := next((run for run in recorded(scratch) if run.row.run == name), None):
        return objective(earlier)  # a sweeper asks for the same values again
    folder, settings = Path(os.path.expanduser(cfg.output or "multirun")), compose.settings(cfg)  # noqa: PTH111
    unended = Row(name, "failed", "its process ended before the run did")
    record(begun := Run(unended, folder, None, 1, settings, cfg.sweep.under), scratch)
    cfg.output = str(folder / name)
    sys.stdout.write(f"\n== {name}\n")
    with reuse.within(scratch / "reuse"):
        wrong = _not_swept(cfg, folder)
        report, error = (None, Refused(wrong)) if wrong else _fulfilled(cfg)
    status, made = failed(error) if error else 0, folder / name if report else None
    run = replace(begun, row=_told(name, report, error), output=made, status=status)
    record(run, scratch)
    thin(recorded(scratch), cfg.sweep)
    return objective(run)


def _not_swept(cfg: Any, folder: Path) -> str | None:
    """Why this is not to be a run of a sweep into the folder, if anything speaks against it."""
    if cfg.report:
        return OWN_REPORTS
    if cfg.sweep.under is not None and not cfg.sweep.under > 0:
        return f"sweep.under: {cfg.sweep.under:g} is no ratio above 0, and no run would be near enough"
    if held := next((name for name in _OF_A_MODEL if (folder / name).is_file()), None):
        return f"output: '{folder}' holds a {held}; a sweep needs a folder of its own, to write below"
    return None


def folder_name(overrides: str) -> str:
    """Swept keys and values as the name of a folder; with a digest where a name cannot say them whole."""
    name = re.sub(r"[^\w.=,+-]", "_", overrides)[:_LONGEST] or "run"
    return name if name in (overrides, "run") else f"{name}-{sha256(overrides.encode()).hexdigest()[:6]}"


def _fulfilled(cfg: Any) -> tuple[Report | None, Exception | None]:
    """The report of a run, and what it ended with if that was an error; a refused result has both."""
    try:
        request = Request(
            pipeline=compose.build(cfg),
            settings=compose.settings(cfg),
            report=expanded("report", cfg.report) if cfg.report else None,
            dry_run=cfg.dry_run,
        )
        return fulfil(request), None
    except Exception as error:
        if cfg.debug:
            traceback.print_exc()
        return error.report if isinstance(error, Rejected) else None, error


def _told(name: str, report: Report | None, error: Exception | None) -> Row:
    """The line of a run in a sweep, with a link to its report."""
    reason = next(iter(str(error).splitlines()), type(error).__name__) if error else None
    return row(name, report, reason, f"{name}{'' if report and report.passed else '.rejected'}/report.html")
