"""Sweeps whose runs are other processes: by joblib, by submitit; and what is told when one of them dies."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from pipeline import __main__ as door
from pipeline import running
from pipeline.ground.leaderboard import Row
from pipeline.sweep import Run, record, recorded
from tests.command import answer, refusal, run
from tests.making import adapter_tensors, write_adapter

REQUEST = ("base_model=base", "verify=structure", "output=sweep")


def leaderboard(here: Path) -> dict[str, str]:
    """Run and result of each line of sweep.csv."""
    return {line["run"]: line["result"] for line in csv.DictReader((here / "sweep" / "sweep.csv").open())}


def test_joblib_runs_in_other_processes_and_the_leaderboard_follows_all(here: Path) -> None:
    write_adapter(here / "other", adapter_tensors(seed=5))
    axis = "adapter=adapter,other,nowhere"
    more = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.keep=best")
    said = run("-m", *more, *REQUEST, axis, cwd=here)
    assert said.returncode == 1, said  # one of them failed, and stopped no other
    found = leaderboard(here)
    assert found == {"adapter=adapter": "verified", "adapter=other": "verified", "adapter=nowhere": "failed"}
    assert "adapter=nowhere failed: adapter: 'nowhere' does not exist" in said.stdout
    assert "error: adapter: 'nowhere' does not exist" in said.stderr
    assert "Traceback" not in said.stderr
    models = list((here / "sweep").glob("*/model.safetensors"))
    assert len(models) == 1  # the best stays, whichever process saw that it is
    assert len(list((here / "sweep").glob("*/report.json"))) == 2
    assert not list(here.glob("*.log"))


def test_submitit_runs_in_jobs_of_its_own(here: Path) -> None:
    said = run(
        "-m", "hydra/launcher=submitit_local", *REQUEST, "adapter=adapter,nowhere", "recipe=merge", cwd=here
    )
    assert said.returncode == 1, said
    assert leaderboard(here) == {"adapter=adapter": "verified", "adapter=nowhere": "failed"}
    alone = answer(*REQUEST[:2], "adapter=adapter", "output=alone", cwd=here)
    assert alone.status == 0
    name = "model.safetensors"
    assert (here / "sweep" / "adapter=adapter" / name).read_bytes() == (here / "alone" / name).read_bytes()
    assert sorted(p.name for p in here.iterdir()) == ["adapter", "alone", "base", "sweep"]


def test_settings_reach_another_process_as_what_they_are() -> None:
    import pickle

    from pipeline.compose import offered
    from pipeline.stage import SLOTS, load_stages

    load_stages()
    for slot in SLOTS:
        for node in offered(slot).values():
            assert pickle.loads(pickle.dumps(node)) is node


def test_a_launcher_without_a_sweep_is_refused(here: Path) -> None:
    for argument in ("hydra/launcher=joblib", "hydra/sweeper=basic"):
        said = refusal(here, *REQUEST, "adapter=adapter", argument)
        assert said.startswith(f"{argument.partition('=')[0]}: launches the runs of a sweep; add -m")


def test_a_launcher_that_is_not_here_is_named_with_what_to_install(here: Path) -> None:
    said = refusal(here, "-m", "hydra/launcher=ray", *REQUEST, "adapter=adapter", "seed=0,1")
    assert said.startswith(
        "hydra/launcher: nothing here is called 'ray'; pip install 'lora-pipeline[sweeps]'"
    )


def test_a_cluster_that_is_not_there_is_told_in_a_sentence(here: Path) -> None:
    said = answer("-m", "hydra/launcher=submitit_slurm", *REQUEST, "adapter=adapter", "seed=0,1", cwd=here)
    assert said.status == 1
    assert said.err.startswith("error: sweep: the launcher gave up (RuntimeError: ")
    assert len(said.err.splitlines()) == 1
    assert not (here / "sweep").exists()


def test_a_recipe_chooses_no_launcher(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults: [override /hydra/launcher: joblib]\n")
    said = refusal(here, "-m", "recipe=./mine.yaml", *REQUEST, "adapter=adapter", "seed=0,1")
    assert "override /hydra/launcher" in said


def test_a_run_whose_process_died_is_on_the_leaderboard(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = running._fulfilled, []

    def dies(cfg: Any) -> Any:
        calls.append(cfg)
        if len(calls) == 2:
            raise KeyboardInterrupt  # ends a worker wherever it is, as a kill does
        return real(cfg)

    def launched(task: Any, arguments: list[str]) -> None:
        try:
            hydra(task, arguments)
        except KeyboardInterrupt:
            raise RuntimeError("a worker was killed") from None

    hydra = door._hydra
    monkeypatch.setattr(running, "_fulfilled", dies)
    monkeypatch.setattr(door, "_hydra", launched)
    said = answer("-m", *REQUEST, "adapter=adapter", "save.dtype=float16,float32", cwd=here)
    assert said.status == 1
    assert said.err == "error: sweep: the launcher gave up (RuntimeError: a worker was killed)\n"
    assert leaderboard(here) == {"save.dtype=float16": "verified", "save.dtype=float32": "failed"}
    assert "save.dtype=float32 failed: its process ended before the run did" in said.out


def test_what_a_run_tells_is_read_as_it_was_told(tmp_path: Path) -> None:
    first = Run(
        Row("b", "verified", "", {"ratio": 0.1, "size": 2.0}, "b/report.html"), tmp_path, tmp_path / "b"
    )
    second = Run(Row("a", "failed", "why"), tmp_path, None, 1, {"save": {"dtype": "float16"}}, 0.01)
    for told in (second, first, second):
        record(told, tmp_path)
    assert recorded(tmp_path) == [first, second]
    assert recorded(tmp_path / "nowhere") == []
