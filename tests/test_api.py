"""`import pipeline`: the command line's pipeline as functions, with nothing left behind in the process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import pipeline
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.html import report_page
from pipeline.ground.report import Rejected
from tests.command import answer, listing, refused

TABLE = {"base_model": "base", "adapter": "adapter", "verify": "structure"}
TYPED = ("base_model=base", "adapter=adapter", "verify=structure")


@pytest.fixture
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with `base` and `adapter`, as the current one."""
    monkeypatch.chdir(here)
    return here


def written(folder: Path) -> dict[str, bytes]:
    """All that a run wrote, but for the figures of its speed."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("report.")}


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "torch transformers peft numpy hydra omegaconf yaml rich matplotlib huggingface_hub"
    code = f"import sys, pipeline; pipeline.run; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout == "[]\n"


def test_a_plan_needs_no_torch(here: Path) -> None:
    code = f"import sys, pipeline; pipeline.plan({TABLE}, output='out'); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=60)
    assert said.stdout == "False\n", said


@pytest.mark.parametrize(
    ("asked", "keys", "typed"),
    [
        (None, {}, ()),
        (TABLE, {"save": {"dtype": "float16"}}, ("save.dtype=float16",)),
        ({**TABLE, "save": {"dtype": "float32"}}, {"save.dtype": "float16"}, ("save.dtype=float16",)),
        ({"recipe": "merge"}, {"merge": "exact", "merge.weight": 0.5}, ("merge.weight=0.5",)),
        ("merge", {"verify": "none", "names": {}}, ("recipe=merge", "verify=none")),
        ("./mine.yaml", {"output": Path("api/out")}, ("recipe=./mine.yaml",)),
        (Path("mine.yaml"), {"seed": 3}, ("recipe=./mine.yaml", "seed=3")),
    ],
)
def test_the_same_request_gives_the_same_bytes(
    inside: Path, asked: Any, keys: dict[str, Any], typed: tuple[str, ...]
) -> None:
    (inside / "mine.yaml").write_text("merge: {weight: 2}\nsave: {max_shard_size: 20kB}\n")
    said = answer(*TYPED, *typed, "output=typed/out", cwd=inside)
    assert said.status == 0, said
    report = pipeline.run(asked, **{**TABLE, "output": "api/out", **keys})
    assert report.passed
    assert report.stands_at == Path("api/out")
    assert written(inside / "api" / "out") == written(inside / "typed" / "out")


def test_values_are_values_whatever_stands_in_them(inside: Path) -> None:
    both = [{"path": Path("adapter"), "weight": 0.5}, "adapter"]
    pipeline.run({**TABLE, "adapter": both}, output=Path("a,b={c}"), quiet=True)
    manifest = json.loads((inside / "a,b={c}" / "merge.json").read_text())
    assert [adapter["weight"] for adapter in manifest["adapters"]] == [0.5, 1.0]
    with pytest.raises(Refused, match="no module of the adapter is 'a=b,c'"):
        pipeline.run(TABLE, output="out", names={"a=b,c": "d{e}"})


@pytest.mark.parametrize(
    ("keys", "typed"),
    [
        ({"base_modle": "x"}, "base_modle=x"),
        ({"save": {"dtyp": "float16"}}, "save.dtyp=float16"),
        ({"save": {"dtype": "float17"}}, "save.dtype=float17"),
        ({"merge": "tiess"}, "merge=tiess"),
        ({"merge": None}, "merge=null"),
        ({"max_rank": "x"}, "max_rank=x"),
        ({"output": ["a"]}, "output=[a]"),
        ({"recipe": "llama13"}, "recipe=llama13"),
        ({"recipe": "./nowhere.yaml"}, "recipe=./nowhere.yaml"),
        ({"recipe": "./round.yaml"}, "recipe=./round.yaml"),
        ({"recipe": "{here}/evil.yaml"}, "recipe={here}/evil.yaml"),
        ({"adapter": 3}, "adapter=3"),
        ({"adapter": "nowhere"}, "adapter=nowhere"),
        ({"rank": -1}, "rank=-1"),
        ({"targeted_modules": "re:("}, "'targeted_modules=\"re:(\"'"),
        ({"output": "base"}, "output=base"),
        ({"save": "none", "save.dtype": "int3"}, "save=none save.dtype=int3"),
    ],
)
def test_what_is_wrong_is_told_in_the_command_lines_sentences(
    inside: Path, keys: dict[str, Any], typed: str
) -> None:
    (inside / "round.yaml").write_text("defaults: [round]\n")
    (inside / "evil.yaml").write_text("hydra: {run: {dir: evil}}\n")
    typed_keys = typed.strip("'").replace("{here}", str(inside)).split()
    keys = {k: v.replace("{here}", str(inside)) if k == "recipe" else v for k, v in keys.items()}
    wanted = refused(inside, *(t for t in TYPED if t.split("=")[0] not in keys), "output=out", *typed_keys)
    before = listing(inside)
    with pytest.raises(Refused) as refusal:
        pipeline.run({**TABLE, "output": "out", **keys})
    assert list(refusal.value.sentences) == wanted
    assert listing(inside) == before


@pytest.mark.parametrize(
    "keys",
    [
        {"hydra": {"run": {"dir": "x"}}},
        {"hydra.run.dir": "x"},
        {"_target_": "os.system"},
        {"merge": {"_target_": "os.system"}},
        {"base_model": "${oc.env:HOME}"},
        {"names": {"a": "${oc.env:HOME}"}},
        {"defaults": ["merge"]},
        {"+merge": {"x": 1}},
        {"~merge": None},
        {"merge": "exact,evil=1"},
        {"recipe": "merge\nhydra.run.dir=x"},
        {"save": {"dtype": object()}},
    ],
)
def test_a_table_is_data_like_a_recipe(inside: Path, keys: dict[str, Any]) -> None:
    before = listing(inside)
    with pytest.raises(Refused) as refusal:
        pipeline.run({**TABLE, "output": "out"}, **keys)
    assert "Traceback" not in str(refusal.value)
    assert listing(inside) == before


@pytest.mark.parametrize(
    ("keys", "said"), [({"dry_run": True}, "pipeline.plan"), ({"recipe": "inspect"}, "plan")]
)
def test_what_makes_no_output_is_asked_of_plan(inside: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        pipeline.run({**TABLE, "output": "out", **keys})


def test_a_recipe_with_axes_is_the_command_lines(inside: Path) -> None:
    with pytest.raises(Refused, match=r"^sweep\.over: "):
        pipeline.run("sweep-dtypes", **TABLE, output="out")


def test_a_plan_tells_all_and_writes_nothing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(inside)
    plan = pipeline.plan(TABLE, output="out", save={"dtype": "float32"})
    assert (plan.base, plan.dtype, plan.count().total()) == ("base", "float32", len(plan.weights))
    assert pipeline.plan("inspect", **{k: TABLE[k] for k in ("base_model", "adapter")}).weights
    with pytest.raises(Refused, match="output: is not set"):
        pipeline.plan(TABLE)
    assert listing(inside) == before
    assert capsys.readouterr() == ("", "")


def test_a_result_that_is_refused_is_returned_and_kept_aside(inside: Path) -> None:
    keys = {"verify": "standard", "verify.tokens": 0, "verify.min_retained": 1.5}
    report = pipeline.run(TABLE, output="out", **keys)
    assert not report.passed
    assert report.stands_at == Path("out.rejected")
    assert (inside / "out.rejected" / "report.json").is_file()
    assert not (inside / "out").exists()
    assert "refused" in repr(report)
    assert "Refused" in report._repr_html_()
    with pytest.raises(
        Rejected, match=r"verification refused the result: retained: .* out\.rejected"
    ) as told:
        report.require()
    assert told.value.report is report
    assert pipeline.run(TABLE, output="fine").require().passed


def test_a_folder_of_somebody_else_is_judged_and_left_alone(inside: Path) -> None:
    pipeline.run(TABLE, output="out")
    before = listing(inside)
    report = pipeline.run("verify", **TABLE, output="out")
    assert report.passed
    assert report.stages["save"] == "existing"
    assert listing(inside) == before


def test_a_run_that_fails_raises_an_error_of_ours(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("pipeline.stages.save.merged.write_shards", full)
    with pytest.raises(PipelineError, match=r"^model\.safetensors: No space left on device") as failure:
        pipeline.run(TABLE, output="out")
    assert not isinstance(failure.value, Refused)
    assert not list(inside.glob("out*"))


def test_a_fault_of_ours_is_not_dressed_up(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.save.merged.write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.run(TABLE, output="out")


def test_quiet_says_nothing_and_otherwise_it_is_the_command_lines_words(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(TABLE, output="out", quiet=True)
    assert capsys.readouterr() == ("", "")
    pipeline.run(TABLE, output="again")
    told = capsys.readouterr().out
    assert told.startswith("plan\n  base ")
    assert told.endswith("done: again\n")


def test_threads_take_turns_and_each_gets_its_own(inside: Path) -> None:
    def one(number: int) -> Any:
        return pipeline.run(TABLE, output=f"out{number}", merge={"weight": number}, quiet=True)

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(one, range(1, 5)))
    assert [report.request["merge"]["weight"] for report in reports] == [1, 2, 3, 4]
    models = {(inside / f"out{n}" / "model.safetensors").read_bytes() for n in range(1, 5)}
    assert len(models) == 4


def test_the_process_is_as_it_was(inside: Path) -> None:
    import torch
    from hydra import initialize_config_dir, version
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    (inside / "conf").mkdir()

    def state() -> Any:
        root = logging.getLogger()
        return (
            GlobalHydra.instance().hydra,
            version.VersionBase.instance().version_base,
            "asked" in ConfigStore.instance().repo,
            (root.level, list(root.handlers), logging.root.manager.disable),
            Path.cwd(),
            dict(os.environ),
            list(sys.argv),
            torch.get_num_threads(),
        )

    with initialize_config_dir(str(inside / "conf"), version_base="1.2"):
        before = state()
        pipeline.run(TABLE, output="out")
        with pytest.raises(Refused):
            pipeline.run(TABLE, output="out")
        assert state() == before
    assert sorted(p.name for p in inside.iterdir()) == ["adapter", "base", "conf", "out"]


class Frame(HTMLParser):
    """The page in the one frame of a fragment."""

    page = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "iframe"
        given = dict(attrs)
        assert given["sandbox"] == ""
        self.page = given["srcdoc"] or ""


@pytest.mark.draws
def test_a_notebook_shows_the_page_that_was_written(inside: Path) -> None:
    report = pipeline.run(TABLE, output="out")
    frame = Frame()
    frame.feed(report._repr_html_())
    assert frame.page == (inside / "out" / "report.html").read_text("utf-8")


@pytest.mark.draws
def test_its_plots_are_all_charts_of_the_page_and_drawings_on_their_own(inside: Path) -> None:
    report = pipeline.run(TABLE, output="out", verify="thorough", **{"verify.tokens": 0})
    assert list(report.plots) == ["retained", "relative_norm", "spread", "ulp", "outerr"]
    assert report_page(report).count("<svg") == len(report.plots)
    for plot in report.plots.values():
        assert ElementTree.fromstring(str(plot)).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in str(plot)
        shown = plot._repr_html_()
        used = {part.partition(")")[0] for part in shown.split("var(")[1:]}
        assert used
        assert all(f"{name}: " in shown for name in used)


def test_a_report_is_one_line_where_there_is_no_page(inside: Path) -> None:
    report = pipeline.run(TABLE, output="out")
    assert repr(report) == f"<Report: passed, {len(report.gates)} of {len(report.gates)} gates passed; out>"
