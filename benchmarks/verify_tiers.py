# ruff: noqa: T201
"""Time and peak memory of the tiers of verification: `verify_tiers.py BASE ADAPTER WORK`.

BASE and ADAPTER are merged into WORK/merged, which must not exist yet; then every tier verifies that folder
in a process of its own. "none" is what all of them share: imports, headers, the plan. Peak memory is what the
process has resident at most, mapped files included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TIERS = {
    "none": ["verify=none"],
    "structure": ["verify=structure"],
    "standard, files and weights": ["verify=standard", "verify.tokens=0"],
    "standard": ["verify=standard"],
    "thorough, files, weights, layers": ["verify=thorough", "verify.tokens=0"],
    "thorough": ["verify=thorough"],
}


def run(command: list[str]) -> tuple[float, float, float, str]:
    """Seconds of wall clock, seconds of CPU, peak resident GB of a process, and what it said."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        said = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--show", action="store_true", help="what each run says, too")
    parser.add_argument("--only", nargs="*", default=list(TIERS), help="of the tiers")
    a = parser.parse_args()
    merged = a.work / "merged"
    ours = [sys.executable, "-m", "pipeline"]
    given = [f"base_model={a.base}", f"adapter={a.adapter}", f"output={merged}"]
    run([*ours, *given, "verify=none"])
    print(f"{'':34}{'wall s':>8}{'cpu s':>8}{'peak GB':>9}")
    try:
        for name in a.only:
            wall, cpu, peak, said = run([*ours, "recipe=verify", *given, *TIERS[name]])
            print(f"{name:34}{wall:8.1f}{cpu:8.1f}{peak:9.2f}", flush=True)
            if a.show:
                print(said)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


if __name__ == "__main__":
    main()
