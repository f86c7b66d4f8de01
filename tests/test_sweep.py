"""Sweeps: what a recipe runs over, the leaderboard at the end, and what stays on disk."""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path

import pytest

from pipeline import recipe_source
from pipeline.ground.leaderboard import Row, as_csv, as_page, best, bests, lines, reasons
from pipeline.running import folder_name
from pipeline.sweep import common, overrides
from tests.command import answer, refusal
from tests.making import adapter_tensors, write_adapter

RECIPE = """
sweep:
  keep: {keep}
  over:
    save.dtype: [bfloat16, float32]
"""
REQUEST = ("recipe=./mine.yaml", "base_model=base", "adapter=adapter", "output=sweep", "verify=structure")


def written(here: Path, keep: str = "all") -> None:
    (here / "mine.yaml").write_text(RECIPE.replace("{keep}", keep))


def models(here: Path) -> list[str]:
    return sorted(p.parent.name for p in (here / "sweep").glob("*/model.safetensors"))


def test_a_recipe_says_what_its_runs_differ_in(here: Path) -> None:
    written(here)
    said = answer(*REQUEST, cwd=here)
    assert said.status == 0, said
    assert models(here) == ["save.dtype=bfloat16", "save.dtype=float32"]
    table = list(csv.DictReader(StringIO((here / "sweep" / "sweep.csv").read_text())))
    assert sorted(row["run"] for row in table) == models(here)
    assert {row["result"] for row in table} == {"verified"}
    page = (here / "sweep" / "sweep.html").read_text()
    assert "2 of 2 runs gave a result that stands" in page
    assert 'href="save.dtype%3Dfloat32/report.html"' in page
    assert "rounding kept" in said.out
    assert " *" in said.out


def test_a_key_on_the_command_line_is_not_swept(here: Path) -> None:
    written(here)
    assert answer(*REQUEST, "save.dtype=float16", cwd=here).status == 0
    assert (here / "sweep" / "model.safetensors").is_file()


def test_of_the_models_the_best_one_stays_and_all_reports_do(here: Path) -> None:
    written(here, "best")
    assert answer(*REQUEST, cwd=here).status == 0
    assert models(here) == ["save.dtype=float32"]  # float32 keeps all of the delta
    thinned = here / "sweep" / "save.dtype=bfloat16"
    assert sorted(p.name for p in thinned.iterdir()) == ["merge.json", "report.html", "report.json"]


def test_no_model_may_stay(here: Path) -> None:
    written(here)
    assert answer(*REQUEST, "sweep.keep=none", cwd=here).status == 0
    assert models(here) == []
    assert len(list((here / "sweep").glob("*/report.json"))) == 2


def test_what_stood_there_before_the_sweep_is_left_alone(here: Path) -> None:
    written(here)
    assert answer(*REQUEST, cwd=here).status == 0
    before = {p: p.stat().st_mtime_ns for p in (here / "sweep").glob("*/*")}
    assert answer(*REQUEST, "sweep.keep=none", cwd=here).status == 1
    assert {p: p.stat().st_mtime_ns for p in (here / "sweep").glob("*/*")} == before


def test_no_sweep_writes_into_a_model(here: Path) -> None:
    written(here)
    before = sorted((here / "base").rglob("*"))
    request = [a.replace("output=sweep", "output=base") for a in REQUEST]
    said = answer(*request, cwd=here)
    assert said.status != 0
    assert "output: 'base' holds a config.json; a sweep needs a folder of its own" in said.err
    assert sorted((here / "base").rglob("*")) == before


def test_no_ratio_is_below_zero(here: Path) -> None:
    written(here)
    said = answer(*REQUEST, "sweep.under=-1", cwd=here)
    assert said.status != 0
    assert "sweep.under: -1 is no ratio above 0" in said.err
    assert not (here / "sweep").exists()


def test_a_refused_run_is_on_the_leaderboard_with_its_figures(here: Path) -> None:
    written(here, "none")
    write_adapter(here / "adapter", adapter_tensors(dtype="F16"))  # small deltas: bfloat16 keeps too little
    request = [a for a in REQUEST if not a.startswith("verify")]
    said = answer(*request, "verify.tokens=0", "verify.min_retained=0.99999", cwd=here)
    assert said.status == 1
    rows = {row["run"]: row for row in csv.DictReader(StringIO((here / "sweep" / "sweep.csv").read_text()))}
    refused = rows["save.dtype=bfloat16"]
    assert (refused["result"], refused["best_by"]) == ("refused", "")
    assert refused["reason"].startswith("retained: 0.99")
    assert float(refused["retained"]) < 1
    assert rows["save.dtype=float32"]["result"] == "verified"
    assert "What failed, and why" in (here / "sweep" / "sweep.html").read_text()
    assert not list((here / "sweep").glob("*.rejected/model.safetensors"))


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("{hydra.launcher: [x]}", "'hydra.launcher' is no key"),
        ("{+evil: [x]}", "'+evil' is no key"),
        ("{output: [a, b]}", "'output' is no key"),
        ("{recipe: [a, b]}", "'recipe' is no key"),
        ("{save.dtype: bfloat16}", "'bfloat16' is not a list of values"),
        ("{save.dtype: [{a: 1}]}", "is not a list of values"),
        ("[a]", "is not a table"),
        ("{rank: ['${oc.env:HOME}']}", "calls a resolver"),
    ],
)
def test_a_recipe_cannot_sweep_over_more_than_settings(here: Path, over: str, said: str) -> None:
    (here / "mine.yaml").write_text(f"sweep: {{over: {over}}}\n")
    told = answer(*REQUEST, cwd=here)
    assert told.status == 2
    assert said in told.err
    assert not (here / "sweep").exists()


@pytest.mark.parametrize(
    "argument", ["output=~nosuchuser/x", "report=~nosuchuser/r.json", "verify.text=~nosuchuser/t"]
)
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["alone", "sweep"])
def test_a_path_of_nobody_is_refused(here: Path, argument: str, sweep: tuple[str, ...]) -> None:
    if sweep and argument.startswith("report"):
        pytest.skip("no run of a sweep has a report= of its own")
    key = argument.partition("=")[0]
    request = (*sweep, "base_model=base", "adapter=adapter", *(["output=out"] if key != "output" else []))
    said = answer(*request, argument, cwd=here)
    assert said.status == (1 if sweep and key == "verify.text" else 2)  # which each run refuses for itself
    assert {line.removeprefix("error: ").partition(": ")[0] for line in said.err.splitlines()} == {key}
    assert "~nosuchuser" in said.err
    assert not (here / "out").exists()


def test_a_path_of_nobody_in_a_recipe_is_refused(here: Path) -> None:
    (here / "mine.yaml").write_text("output: ~nosuchuser/x\nreport: ~nosuchuser/r.json\n")
    request = ("recipe=./mine.yaml", "base_model=base", "adapter=adapter")
    assert refusal(here, *request, "report=null").startswith("output: '~nosuchuser/x' names no user's home")
    assert refusal(here, *request, "output=out").startswith("report: '~nosuchuser/r.json' names no user's")
    assert answer("-m", *request, "seed=0,1", cwd=here).err.startswith("error: report: every run of a sweep")
    (here / "mine.yaml").write_text("output: ~nosuchuser/x\n")
    said = answer("-m", *request, "seed=0,1", cwd=here)
    assert (said.status, len(said.err.splitlines())) == (1, 2)  # each run refuses it
    assert said.err.startswith("error: output: '~nosuchuser/x/seed=0' names no user's home")
    assert not (here / "~nosuchuser").exists()


def test_values_that_no_folder_name_can_hold_have_folders_of_their_own(here: Path) -> None:
    names = {folder_name(f"adapter={path}") for path in ("a/b", "a_b", "a b", "a:b", "a" * 300, "a" * 301)}
    assert len(names) == 6
    assert all(len(name) < 200 and re.fullmatch(r"[\w.=,+-]+", name) for name in names)
    assert folder_name("rank=8,save.dtype=float16") == "rank=8,save.dtype=float16"
    for folder in ("a/b", "a_b"):
        write_adapter(here / folder)
    said = answer(
        "-m", "base_model=base", "adapter=a/b,a_b", "output=sweep", "verify=none", "sweep.keep=none", cwd=here
    )
    assert said.status == 0, said
    assert len(list((here / "sweep").glob("*/report.json"))) == 2


def test_values_are_values_whatever_stands_in_them() -> None:
    axes = {"names": ["a,b", "x=y", "choice(1)"], "rank": [4, None, True, 0.5]}
    told = overrides(axes, ["output=x"])
    assert told == ["names='a,b','x=y','choice(1)'", "rank=4,null,true,0.5"]
    assert overrides(axes, ["rank=2", "names=z"]) == []


def row(run: str, result: str = "verified", **values: float) -> Row:
    return Row(run, result, "why" if result == "refused" else "", values)


ROWS = [
    row("a", ratio=1e-3, retained=0.98, size=100.0, seconds=2.0),
    row("b", ratio=1e-5, retained=1.0, size=200.0, seconds=2.0),
    row("c", "refused", ratio=1e-9, retained=1.0, size=1.0, seconds=0.1),
    Row("d", "failed", "disk full"),
]


def test_the_best_are_marked_among_sound_runs_alone() -> None:
    assert bests(ROWS) == {"ratio": {"b"}, "retained": {"b"}, "size": {"a"}}
    chosen = best(ROWS)
    assert chosen is not None
    assert chosen.run == "b"
    assert [line["run"] for line in lines(ROWS)] == ["run", "b", "a", "c", "d"]
    assert lines(ROWS)[1]["ratio"] == "1e-05 *"
    assert lines(ROWS)[4]["result"] == "failed"
    assert reasons(ROWS) == ["c refused: why", "d failed: disk full"]
    assert best([row("x", "refused")]) is None


def test_a_cell_is_no_formula_and_no_markup() -> None:
    evil = [Row("=cmd|' /C calc'!A0", "failed", "<script>x</script>"), row("<b>", ratio=1.0, size=1.0)]
    cells = list(csv.reader(StringIO(as_csv(evil))))
    assert cells[2][0].startswith("'=cmd")
    assert cells[1][:3] == ["<b>", "verified", ""]
    page = as_page(evil, {"merge": {"weight": "<i>"}})
    assert "<script" not in page
    assert "<b>" not in page.replace('<b class="word">', "").replace("<b>=cmd", "")
    assert "&lt;i&gt;" in page


def test_what_all_runs_share_is_told_once() -> None:
    tables = [{"a": 1, "save": {"dtype": d, "x": 2}, "rank": 3} for d in ("f", "g")]
    assert common(tables) == {"a": 1, "save": {"x": 2}, "rank": 3}


def test_the_bundled_sweep_has_its_axes() -> None:
    assert set(recipe_source.axes("sweep-dtypes")) == {"merge_dtype", "save.dtype"}
    assert recipe_source.axes("merge") == {}
