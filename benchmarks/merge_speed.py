# ruff: noqa: T201
"""Time and memory of a merge beside `cp -r` of the base and beside PEFT.

`merge_speed.py FOLDER [--rounds 3]`, where FOLDER holds what `synthetic.py FOLDER` wrote. All contenders run
in turn, round by round, each as a process of its own; figures are medians over the rounds, ratios are taken
within a round. The base is read once before, so that all find it in the page cache. "sync" counts until the
files are on the disk, as a published merge always does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds of wall clock, seconds of CPU, peak resident GB of a process."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: {said.decode()}")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    a = parser.parse_args()
    base, adapter, out = a.folder / "base", a.folder / "adapter", a.folder / "benchmark-output"
    ours = [sys.executable, "-m", "pipeline", f"base_model={base}", f"adapter={adapter}", f"output={out}"]
    contenders = {
        "cp -r": ["cp", "-r", str(base), str(out)],
        "cp -r, sync": ["sh", "-c", f"cp -r '{base}' '{out}' && sync '{out}'/*"],
        "import torch": [sys.executable, "-c", "import torch"],
        "ours, verify=none": [*ours, "verify=none"],
        "ours, verify=structure": [*ours, "verify=structure"],
        "ours, verify=standard verify.tokens=0": [*ours, "verify.tokens=0"],
    }
    if not a.no_peft:
        contenders["PEFT load, merge, save"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)]
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for _ in range(a.rounds):
        for name, command in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            figures[name].append(run(command))
    shutil.rmtree(out, ignore_errors=True)
    print(f"{'':40}{'wall s':>8}{'cpu s':>8}{'peak GB':>9}{'/ cp':>7}{'/ cp, sync':>11}")
    for name, rows in figures.items():
        wall, cpu, peak = (median(column) for column in zip(*rows, strict=True))
        to_cp, to_sync = (
            median(mine[0] / theirs[0] for mine, theirs in zip(rows, figures[other], strict=True))
            for other in ("cp -r", "cp -r, sync")
        )
        print(f"{name:40}{wall:8.2f}{cpu:8.2f}{peak:9.2f}{to_cp:7.2f}{to_sync:11.2f}")


if __name__ == "__main__":
    main()
