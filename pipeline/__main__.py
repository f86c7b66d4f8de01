"""`python -m pipeline recipe=llama31`: composes the request with Hydra and fulfils it.

Exit status: 0 done and verified, 1 the run failed or verification refused it, 2 the request is wrong.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import compose, recipe_source, stage
from pipeline.arguments import is_sweep, prepared
from pipeline.door import Request, fulfil
from pipeline.ground.errors import Refused
from pipeline.ground.manifest import own_version
from pipeline.ground.paths import bundled
from pipeline.ground.report import Rejected, Report
from pipeline.help import text
from pipeline.refusing import understood
from pipeline.sweep import Run, finish, overrides, thin


@dataclass
class Outcome:
    """What became of one run: its exit status and, in a sweep, its line."""

    status: int
    run: Run


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    arguments = sys.argv[1:]
    debug = "debug=true" in (a.lower().lstrip("+") for a in arguments)
    try:
        stage.load_stages()
        if not arguments or {"--help", "-h"} & set(arguments):
            sys.stdout.write(text())
            return 0
        if "--version" in arguments:
            sys.stdout.write(f"lora-pipeline {own_version()}\n")
            return 0
        compose.register()
        recipe_source.register()
        return _run(prepared(_with_axes(arguments)))
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(error)


def _run(arguments: list[str]) -> int:
    import hydra

    outcomes: list[Outcome] = []
    asked: list[Any] = []  # what each of them is asked to do

    @hydra.main(version_base="1.3", config_path=str(bundled("conf")), config_name="config")
    def task(cfg: Any) -> None:
        if not is_sweep(arguments):
            outcomes.append(_fulfilled(cfg))
            return
        asked.append((Path(os.path.expanduser(cfg.output or "multirun")), compose.settings(cfg)))  # noqa: PTH111
        outcomes.append(_fulfilled(cfg))
        thin([outcome.run for outcome in outcomes], cfg.sweep.keep)

    # Hydra's own errors are to reach us, and a sweep's record is to litter nobody's folder.
    previous, sys.argv = sys.argv, [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with tempfile.TemporaryDirectory(prefix="pipeline-sweep-") as scratch:
        if is_sweep(arguments):
            sys.argv += [f"hydra.sweep.dir='{scratch}'", *_unswept(arguments)]
        try:
            task()
        finally:
            sys.argv = previous
    if is_sweep(arguments) and outcomes:
        from pipeline.ground.leaderboard import lines
        from pipeline.ground.terminal import show_sweep

        runs = [outcome.run for outcome in outcomes]
        finish(runs, asked[0][0], [settings for _, settings in asked])
        show_sweep(lines([run.row for run in runs]))
        return 1 if any(outcome.status for outcome in outcomes) else 0
    return outcomes[0].status if outcomes else 0


def _with_axes(arguments: list[str]) -> list[str]:
    """The arguments, with what the recipe itself sweeps over."""
    recipe = next((a.partition("=")[2] for a in arguments if a.startswith("recipe=")), "")
    axes = overrides(recipe_source.axes(recipe), arguments) if recipe else []
    return [*(["-m"] if axes and not is_sweep(arguments) else []), *arguments, *axes]


def _unswept(arguments: list[str]) -> list[str]:
    """Tells Hydra which keys are the same in all runs, so that a run's folder is named by the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    same = [o.key_or_group for o in overrides if not o.is_sweep_override() or o.key_or_group == "output"]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"]


def _fulfilled(cfg: Any) -> Outcome:
    """One run, with its failure told; in a sweep it writes below `output`, and the others go on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    name = ""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        name = re.sub(r"[^\w.=,+-]", "_", HydraConfig.get().job.override_dirname) or "run"
        cfg.output = str(Path(cfg.output or "multirun").expanduser() / name)
        sys.stdout.write(f"\n== {name}\n")
    error: Exception | None = None
    try:
        report = fulfil(
            Request(
                pipeline=compose.build(cfg),
                settings=compose.settings(cfg),
                report=Path(cfg.report).expanduser() if cfg.report else None,
                dry_run=cfg.dry_run,
            )
        )
    except KeyboardInterrupt:
        raise
    except Exception as caught:
        if cfg.debug:
            traceback.print_exc()
        error, report = caught, caught.report if isinstance(caught, Rejected) else None
    status = _failed(error) if error else 0
    return Outcome(status, _told(name, report, error, cfg.output if name else ""))


def _told(name: str, report: Report | None, error: Exception | None, output: str) -> Run:
    """The line of a run in a sweep; its folder where this run has made one."""
    from pipeline.ground.leaderboard import row

    reason = next(iter(str(error).splitlines()), type(error).__name__) if error else None
    link = f"{name}{'' if report and report.passed else '.rejected'}/report.html"
    return Run(row(name, report, reason, link), Path(output) if report else None)


def _failed(error: Exception) -> int:
    """Tells an error in sentences, and gives the exit status it means."""
    known = understood(error, _argument)
    for told in known.sentences if isinstance(known, Refused) else [str(known)] if known else []:
        _tell(told)
    if known:
        return 2 if isinstance(known, Refused) else 1
    reason = (str(error).splitlines() or [""])[0]
    _tell(f"internal error: {type(error).__name__}: {reason}; run again with debug=true and report it")
    return 1


def _argument(key: str) -> str:
    """The value that the command line gives a key."""
    return next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith(f"{key}=")), "")


def _tell(what: str) -> None:
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in what)
    sys.stderr.write(f"error: {plain}\n")


if __name__ == "__main__":
    sys.exit(main())
