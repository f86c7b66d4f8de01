"""`python -m pipeline recipe=llama31`: composes the request with Hydra and fulfils it.

Exit status: 0 done and verified, 1 the run failed or verification refused it, 2 the request is wrong.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import bisection, compose, recipe_source, running, stage
from pipeline.arguments import is_sweep, prepared, quoted
from pipeline.ground.manifest import own_version
from pipeline.ground.paths import bundled
from pipeline.help import text
from pipeline.refusing import check_grammar
from pipeline.sweep import finish, near_enough, overrides, recorded
from pipeline.telling import failed, first_line, is_known, tell


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    gc.set_threshold(100_000, 20, 20)  # importing torch and transformers makes millions of objects to keep
    atexit.register(gc.freeze)  # else the interpreter looks through them all again when it ends: a second
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
        ready = prepared(_with_axes(arguments))
        check_grammar(ready)
        return _sweep(ready) if is_sweep(ready) else _run(ready)
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return failed(error)


def _run(arguments: list[str]) -> int:
    statuses = [0]  # where Hydra only shows something, nothing is run
    _hydra(lambda cfg: statuses.append(running.alone(cfg)), arguments)
    return statuses[-1]


def _sweep(arguments: list[str]) -> int:
    """All runs, whoever launches them, and the leaderboard; 1 if any failed."""
    from pipeline.ground.leaderboard import lines, reasons, verdict
    from pipeline.ground.terminal import show_sweep

    broken = False
    with tempfile.TemporaryDirectory(prefix="pipeline-sweep-", ignore_cleanup_errors=True) as scratch:
        try:
            _launch(arguments, Path(scratch))
        except Exception as error:
            if not recorded(Path(scratch)) and is_known(error):
                raise
            broken = True  # a worker that was killed, a cluster that is not there
            tell(f"sweep: the launcher gave up ({type(error).__name__}: {first_line(error)})")
        runs = recorded(Path(scratch))
    if runs:
        finish(runs)
        rows = [run.row for run in runs]
        show_sweep(lines(rows), [*reasons(rows), *verdict(rows, runs[0].under)])
    return 1 if broken or any(run.status for run in runs) else 0


def _launch(arguments: list[str], scratch: Path) -> None:
    """Runs for all values; or for as few as show the smallest that is near enough, one after the other."""
    same, swept = _axes(arguments)
    inside = [f"hydra.sweep.dir={quoted(str(scratch))}"]
    inside.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]")
    ordered = bisection.axis(swept)
    chosen_by_another = any(a.startswith("hydra/sweeper=") for a in arguments)
    if not ordered or chosen_by_another or _under(arguments) is None or "dry_run=true" in arguments:
        _hydra(running.swept, [*arguments, *inside])
        return
    key, values = ordered
    others = [a for a in arguments if a.partition("=")[0] != key]

    def is_near_enough(value: str) -> bool | None:
        _hydra(running.swept, [*others, f"{key}={value}", *inside])
        return near_enough(recorded(scratch)[-1])

    sys.stdout.write(f"sweep.under: bisection over {key}, {len(values)} values\n")
    bisection.bisect(values, is_near_enough)


def _hydra(task: Callable[[Any], Any], arguments: list[str]) -> None:
    """Composes what is asked for and calls the task, once or for each run; raises Hydra's own errors."""
    import hydra

    previous, sys.argv = sys.argv, [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(bundled("conf")), config_name="config")(task)()
    finally:
        sys.argv = previous


def _with_axes(arguments: list[str]) -> list[str]:
    """The arguments, with what the recipe itself sweeps over."""
    recipe = _recipe(arguments)
    axes = overrides(recipe_source.axes(recipe), arguments) if recipe else []
    return [*(["-m"] if axes and not is_sweep(arguments) else []), *arguments, *axes]


def _recipe(arguments: list[str]) -> str:
    return next((a.partition("=")[2] for a in arguments if a.startswith("recipe=")), "")


def _under(arguments: list[str]) -> float | None:
    """The KL ratio that is near enough, if the command line or the recipe's own file gives one."""
    said = next((a.partition("=")[2] for a in arguments if a.startswith("sweep.under=")), None)
    try:
        return float(said) if said is not None else recipe_source.under(_recipe(arguments).strip("'"))
    except ValueError:
        return None  # which composing refuses


def _axes(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(keys that are the same in all runs, and so are in no run's name; the others with their values)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    swept = {
        o.key_or_group: list(o.sweep_string_iterator())
        for o in parsed
        if o.is_sweep_override() and o.is_discrete_sweep() and o.key_or_group != "output"
    }
    same = [o.key_or_group for o in parsed if not o.is_sweep_override() or o.key_or_group == "output"]
    return same, swept


if __name__ == "__main__":
    sys.exit(main())
