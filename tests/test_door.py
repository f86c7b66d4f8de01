"""The door: what a user types, what is told, what is written - and that an early end leaves nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.command import ARGUMENTS, answer, listing, refusal, refused, run
from tests.making import (
    adapter_tensors,
    base_tensors,
    floats,
    llama_config,
    lora_config,
    with_header,
    write_adapter,
    write_base,
    write_json,
)

UNPROVED = (*ARGUMENTS, "verify=none")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def spoil(folder: Path) -> None:
    """Makes the base one whose merge fails while it is at work."""
    write_base(folder / "base", base_tensors() | {Q_PROJ: floats("BF16", np.full((32, 32), np.nan))})


# Help and mistakes, at once


def fastest(request: Callable[[], object]) -> float:
    """Seconds of CPU, the best of three: other work on the machine is not what is measured."""
    times = []
    for _ in range(3):
        begun = _children()
        request()
        times.append(_children() - begun)
    return min(times)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_lists_recipes_keys_stages_and_settings_within_two_seconds(tmp_path: Path) -> None:
    said = run("--help", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    for name in (
        "quickstart",
        "llama31",
        "merge",
        "verify",
        "inspect",
        "base_model",
        "merge_dtype",
        "dry_run",
    ):
        assert f"\n  {name} " in said.stdout
    for name in ("exact", "peft", "gguf", "safetensors", "both", "existing", "structure", "standard"):
        assert f"\n  {name} " in said.stdout
    for setting in ("merge.weight", "save.dtype", "save.max_shard_size", "verify.tokens"):
        assert f"{setting} " in said.stdout
    assert fastest(lambda: run("--help", cwd=tmp_path)) < 2
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("arguments", [(), ("-h",), ("recipe=llama31", "--help")])
def test_help_is_what_one_gets_who_does_not_know_what_to_type(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    said = answer(*arguments, cwd=tmp_path)
    assert said.status == 0
    assert "python -m pipeline KEY=VALUE" in said.out


def test_a_misspelt_key_is_told_within_two_seconds(tmp_path: Path) -> None:
    said = run("base_modle=x", cwd=tmp_path)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == "error: base_modle: no such key; did you mean base_model\n"
    assert fastest(lambda: run("base_modle=x", cwd=tmp_path)) < 2
    assert listing(tmp_path) == {}


IMPORTS = """
import sys
from pipeline.__main__ import main
status = main()
heavy = {"torch", "transformers", "peft", "gguf", "tokenizers"} & set(sys.modules)
sys.stderr.write(f"status {status} imported {sorted(heavy)}")
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--help",), 0),
        (("base_modle=x",), 2),
        (("merge=ties2",), 2),
        (("recipe=lama31",), 2),
        ((*ARGUMENTS, "dry_run=true"), 0),
        ((*ARGUMENTS, "dry_run=true", "verify=standard", "save=both", "device=cpu"), 0),
        (("recipe=inspect", "base_model=base", "adapter=adapter"), 0),
        (("base_model=nowhere", "adapter=adapter", "output=out"), 2),
    ],
)
def test_what_computes_nothing_imports_nothing_heavy(
    here: Path, arguments: tuple[str, ...], status: int
) -> None:
    code = [sys.executable, "-c", IMPORTS, *arguments]
    said = subprocess.run(code, cwd=here, capture_output=True, text=True, timeout=60)
    assert said.stderr.endswith(f"status {status} imported []"), said


# Wrong requests


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("mrege=exact", ["mrege: no such key; did you mean merge"]),
        ("merge.wieght=2", ["merge.wieght: no such key; did you mean merge.weight"]),
        ("+bas=3", ["bas", "no such key"]),
        ("++bas=3", ["bas", "no such key"]),
        ("+merge.bas=3", ["merge.bas", "no such key"]),
        ("merge=ties2", ["merge: no stage 'ties2'; choose dare_linear, dare_ties, exact, linear, "]),
        ("save=nothing", ["save: no stage 'nothing'; choose adapter, auto, both, existing, merged, none"]),
        ("load=pickle", ["load: no stage 'pickle'; choose auto, gguf, safetensors"]),
        ("verify=logits", ["verify: no stage 'logits'; choose none, standard, structure"]),
        ("merge=null", ["merge: ", "exact"]),
        ("merge=", ["merge: ", "exact"]),
        ("~merge", ["merge: choose one of dare_linear, dare_ties, exact, linear, "]),
        ("merge.weight=two", ["merge.weight", "'two'"]),
        ("merge.weight=0", ["merge.weight: 0.0 would merge nothing; give a finite factor other than 0"]),
        ("merge.weight=inf", ["merge.weight: inf would merge nothing"]),
        ("rank=four", ["rank", "'four'"]),
        ("rank=4.5", ["rank", "4.5"]),
        ("dry_run=perhaps", ["dry_run", "'perhaps'"]),
        ("save.dtype=int8", ["save.dtype: 'int8' is none of keep, bfloat16, float16, float32"]),
        ("merge_dtype=half", ["merge_dtype: 'half' is none of float64, float32, bfloat16, float16"]),
        ("save.max_shard_size=huge", ["save.max_shard_size: 'huge' is not a size; write it as 5GB"]),
        ("save.max_shard_size=0", ["save.max_shard_size: '0' is not a size"]),
        ("memory_limit=lots", ["memory_limit: 'lots' is not a size; write it as 5GB"]),
        ("memory_limit=-1", ["memory_limit: -1 is not a size"]),
        ("names=3", ["names", "3"]),
        ("targeted_modules=3", ["targeted_modules: 3 is not a list of module names"]),
        ("targeted_modules=[]", ["targeted_modules: [] is not a list of module names"]),
        ("device=tpu", ["device: 'tpu' is none of auto, cpu, cuda, cuda:1, mps, xpu"]),
        ("device=cuda:99", ["device: cuda:99 is not there", "use cpu or auto"]),
        ("verify=standard verify.tokens=-3", ["verify.tokens: -3 is not a number of tokens"]),
        ("report=nowhere/report.json", ["report: 'nowhere' is not a folder"]),
        ("report=adapter", ["report: 'adapter' is a folder"]),
        ("output=adapter", ["output: 'adapter' exists already; give another folder, or remove it first"]),
        ("output=adapter/adapter_config.json", ["output: ", "exists already"]),
        (
            "output=adapter/adapter_config.json/x",
            ["adapter_config.json' is not a folder that can be written"],
        ),
        ("output=.", ["output: '.' exists already"]),
        ("output=/", ["output: '/' exists already"]),
        ("output=", ["output: is not set; give the folder to create, as output=..."]),
        (
            "base_model=",
            ["base_model: is not set; give a folder, a GGUF file or a hub id, as base_model=..."],
        ),
        ("adapter=null", ["adapter: is not set; give the folder or hub id of an adapter, as adapter=..."]),
        ("output=~nosuchuser/x", ["output: ", "~nosuchuser"]),
        ("base_model=~nosuchuser/x", ["base_model: ", "~nosuchuser"]),
        ("word", ["word", "KEY=VALUE"]),
        ("two words=3", ["two words"]),
        ("=x", ["=x"]),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(here: Path, argument: str, parts: list[str]) -> None:
    words = argument.split() if argument.startswith("verify=") else [argument]
    key = argument.partition("=")[0]
    others = [a for a in UNPROVED if not a.startswith(f"{key}=")]
    sentence = refusal(here, *others, *words)
    assert all(part in sentence for part in parts), sentence


def test_an_unknown_flag_is_told_in_one_sentence(here: Path) -> None:
    sentence = refusal(here, *UNPROVED, "--dry-run")
    assert "--dry-run" in sentence


def test_a_dangling_link_at_output_is_not_written_through(here: Path) -> None:
    (here / "out").symlink_to(here / "elsewhere")
    assert "output: 'out' exists already" in refusal(here, *UNPROVED)


def test_all_missing_keys_are_told_at_once(tmp_path: Path) -> None:
    assert [s.partition(":")[0] for s in refused(tmp_path, "recipe=merge")] == [
        "base_model",
        "adapter",
        "output",
    ]


def test_faults_of_different_stages_are_told_at_once(here: Path) -> None:
    sentences = refused(
        here, "base_model=nowhere", "adapter=lost", "output=base", "device=tpu", "merge.weight=0", "rank=9"
    )
    assert {s.partition(":")[0] for s in sentences} == {
        "base_model", "adapter", "output", "device", "merge.weight",
    }  # fmt: skip


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.ground import workplace

    monkeypatch.setattr(workplace, "free_bytes", lambda output: 1234)
    sentence = refusal(here, *UNPROVED)
    assert sentence == "output: 'out' needs 41.5 kB, but its disk has 1.23 kB free"


def test_a_folder_of_somebody_elses_in_the_workplaces_stead_is_left_alone(here: Path) -> None:
    (here / "out.partial").mkdir()
    (here / "out.partial" / "thesis.txt").write_text("years of work")
    sentence = refusal(here, *UNPROVED)
    assert "out.partial' is in the way and was not made by a run; move it aside" in sentence


def test_a_refused_request_makes_no_parent_folders(here: Path) -> None:
    sentence = refusal(here, *ARGUMENTS[:2], "output=new/and/newer/out", "rank=9", "verify=none")
    assert sentence == "rank: the recipe says 9, the adapter has 4"


def test_a_failed_run_takes_the_parent_folders_it_made_away_again(here: Path) -> None:
    spoil(here)
    before = listing(here)
    said = answer(*ARGUMENTS[:2], "output=new/and/newer/out", "verify=none", cwd=here)
    assert said.status == 1
    assert listing(here) == before


def test_parent_folders_of_a_good_run_are_made(here: Path) -> None:
    said = answer(*ARGUMENTS[:2], "output=new/and/newer/out", "verify=none", cwd=here)
    assert said.status == 0
    assert (here / "new" / "and" / "newer" / "out" / "config.json").is_file()


def test_a_traceback_is_shown_with_debug_alone(here: Path) -> None:
    plain = answer(*UNPROVED, "rank=9", cwd=here)
    debugged = answer(*UNPROVED, "rank=9", "debug=true", cwd=here)
    assert (plain.status, debugged.status) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in debugged.err
    assert debugged.err.endswith(plain.err)


def test_a_traceback_of_a_wrong_key_is_shown_with_debug_alone(here: Path) -> None:
    assert "Traceback" not in answer("base_modle=x", cwd=here).err
    assert "Traceback" in answer("base_modle=x", "debug=true", cwd=here).err


@pytest.mark.parametrize("argument", ["rank=5", "alpha=4", "targeted_modules=[o_proj]"])
def test_an_adapter_that_differs_from_what_is_expected_is_refused(here: Path, argument: str) -> None:
    key, _, value = argument.partition("=")
    sentence = refusal(here, *UNPROVED, argument)
    assert sentence.startswith(f"{key}: the recipe ")
    assert value.strip("[]") in sentence
    assert {"rank": "has 4", "alpha": "has 8", "targeted_modules": "self_attn.q_proj (4 modules"}[
        key
    ] in sentence


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank=4", "alpha=8", "targeted_modules=[q_proj,v_proj]"),
        ("targeted_modules=[self_attn]",),
        ("targeted_modules={filter: 'q_proj, v_proj, o_proj'}",),
        ("targeted_modules=['re:.*_proj']",),
        ("targeted_modules=[layers.*.self_attn]",),
    ],
)
def test_an_adapter_that_is_as_expected_is_taken(here: Path, arguments: tuple[str, ...]) -> None:
    assert answer(*UNPROVED, *arguments, "dry_run=true", cwd=here).status == 0


@pytest.mark.parametrize("pattern", ["proj", "self", "attn", "q", "re:q_proj", "layers.self_attn"])
def test_a_module_name_never_means_a_part_of_a_component(here: Path, pattern: str) -> None:
    sentence = refusal(here, *UNPROVED, f"targeted_modules=['{pattern}']")
    assert sentence.startswith(f"targeted_modules: the recipe covers {pattern}, but the adapter also changes")


def test_expectations_hold_for_every_rank_and_alpha_of_the_patterns(here: Path) -> None:
    mixed = {
        **adapter_tensors(["model.layers.0.self_attn.q_proj"], rank=4),
        **adapter_tensors(["model.layers.0.self_attn.v_proj"], rank=2),
    }
    config = lora_config(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 16})
    write_adapter(here / "adapter", mixed, config)
    sentences = refused(here, *UNPROVED, "rank=4", "alpha=8")
    assert sentences == [
        "rank: the recipe says 4, the adapter has 2, 4",
        "alpha: the recipe says 8, the adapter has 8, 16",
    ]


# Plans


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path) -> None:
    before = listing(here)
    said = answer(*ARGUMENTS, "dry_run=true", cwd=here)
    assert (said.status, said.err) == (0, "")
    for part in (
        "4 x LoRA rank 4 scale 2",
        "17 copied",
        "4 merged",
        "41.5 kB in 1 file",
        "float32",
        "bfloat16",
    ):
        assert part in said.out
    assert listing(here) == before


def test_a_dry_run_is_refused_for_what_a_run_would_be(here: Path) -> None:
    (here / "out").mkdir()
    assert "output: 'out' exists already" in refusal(here, *ARGUMENTS, "dry_run=true")


def test_inspect_needs_no_output_and_lists_every_weight_that_changes(here: Path) -> None:
    before = listing(here)
    said = answer("recipe=inspect", "base_model=base", "adapter=adapter", cwd=here)
    assert said.status == 0
    assert f"{Q_PROJ} [32, 32] BF16 -> BF16: LoRA rank 4 scale 2" in said.out
    assert listing(here) == before


def test_what_stands_at_output_can_be_checked_and_is_left_as_it_is(here: Path) -> None:
    assert answer(*UNPROVED, cwd=here).status == 0
    before = listing(here)
    said = answer("recipe=verify", *ARGUMENTS, "verify=structure", cwd=here)
    assert said.status == 0, said
    assert listing(here) == before


def test_an_output_that_was_changed_is_refused_by_the_check_and_left_as_it_is(here: Path) -> None:
    assert answer(*UNPROVED, cwd=here).status == 0
    weights = here / "out" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1  # the last tensor is lm_head, which no delta reaches
    weights.write_bytes(whole)
    before = listing(here)
    said = answer("recipe=verify", *ARGUMENTS, "verify=structure", cwd=here)
    assert said.status == 1
    assert "error: verification refused the result: untouched: lm_head.weight differs" in said.err
    assert listing(here) == before


def test_a_report_goes_where_it_is_wanted(here: Path) -> None:
    assert answer(*ARGUMENTS, "verify=structure", "report=mine.json", cwd=here).status == 0
    mine = json.loads((here / "mine.json").read_text())
    assert mine["passed"] is True
    assert mine == json.loads((here / "out" / "report.json").read_text())
    assert (here / "mine.html").read_bytes() == (here / "out" / "report.html").read_bytes()


def test_a_report_may_be_the_page_alone(here: Path) -> None:
    assert answer(*ARGUMENTS, "verify=structure", "report=mine.html", cwd=here).status == 0
    assert (here / "mine.html").read_text().startswith("<!doctype html>")
    assert not (here / "mine.json").exists()


def test_what_is_published_names_no_path_of_this_machine(here: Path) -> None:
    absolute = [f"{a.partition('=')[0]}={here / a.partition('=')[2]}" for a in ARGUMENTS]
    (here / "own.txt").write_text("words")
    own = ["verify.tokens=0", f"verify.text={here / 'own.txt'}", "verify.min_retained=0"]
    assert answer(*absolute, *own, f"report={here / 'mine.json'}", cwd=here).status == 0
    for path in (here / "out").iterdir():
        assert str(here).encode() not in path.read_bytes(), path.name


# Paths


ODD = [
    "a=b",
    "tilde~",
    "with, comma",
    "with space",
    "par(en)s",
    "it's",
    'double"quote',
    "both'\"",
    "br[ack]et",
    "br{ac}e",
    "back\\slash",
    "\\'",
    "dollar$HOME",
    "hash#",
    "at@sign",
    "co:lon",
    "percent%20",
    "ünï-cødé",
    "plus+",
    "-dash",
    "true",
    "3",
    "new\nline",
]


@pytest.mark.parametrize("odd", ODD)
def test_no_character_of_a_path_is_grammar(tmp_path: Path, odd: str) -> None:
    write_base(tmp_path / odd / "base")
    write_adapter(tmp_path / "a" / odd)
    said = answer(
        f"base_model={odd}/base",
        f"adapter=./a/{odd}",
        f"output={tmp_path}/o/{odd}",
        f"report=./{odd}/r.json",
        "verify=none",
        cwd=tmp_path,
    )
    assert said.status == 0, said
    assert (tmp_path / "o" / odd / "config.json").is_file()
    assert (tmp_path / odd / "r.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {odd, "a", "o"}


@pytest.mark.parametrize(
    "argument",
    [
        "targeted_modules=re:.*(self_attn|mlp)[.](q|k|v|o|gate|up|down)_proj",
        "targeted_modules='re:.*(self_attn|mlp).*'",
        "targeted_modules=[self_attn,mlp]",
        "verify.prompts=Who, if not you (it's = me): why?",
        "verify.prompts=[One?,Two?]",
    ],
)
def test_no_character_of_a_text_or_pattern_is_grammar(here: Path, argument: str) -> None:
    said = answer(*ARGUMENTS, argument, "dry_run=true", cwd=here)
    assert said.status == 0, said


def test_the_file_of_a_text_may_be_called_anything(here: Path) -> None:
    sentence = refusal(
        here,
        "recipe=extract",
        "base_model=base",
        "finetune=base",
        "output=out",
        "extract.calibration=a (b).txt",
    )
    assert sentence.startswith("extract.calibration: 'a (b).txt' cannot be read as text")


def test_what_cannot_be_read_is_told_by_its_key_all_at_once(here: Path) -> None:
    sentences = refused(here, *ARGUMENTS, "rank={energy: .9", "save.dtype=(", "targeted_modules=[re:(q|v)]")
    assert [s.partition(" cannot be read; close what is open")[0] for s in sentences] == [
        "rank: {energy: .9",
        "save.dtype: (",
        "targeted_modules: [re:(q|v)]",
    ]


def test_several_values_without_a_sweep_are_told_as_such(here: Path) -> None:
    assert refusal(here, *ARGUMENTS, "save.dtype=bfloat16,float16") == (
        "save.dtype: bfloat16,float16 are several values; add -m for a run with each, or write a [list]"
    )


@pytest.mark.parametrize("odd", ["~tilde", "[list]", "{table}", "'quoted'", '"quoted"', "${x}"])
def test_a_path_that_begins_like_grammar_is_a_path_after_a_dot(tmp_path: Path, odd: str) -> None:
    write_base(tmp_path / odd)
    write_adapter(tmp_path / "adapter")
    said = answer(f"base_model=./{odd}", "adapter=adapter", f"output=./o/{odd}", "verify=none", cwd=tmp_path)
    if odd == "${x}":  # a reference to another key, wherever it stands
        assert (said.status, said.errors) == (2, ["base_model: refers to 'x', which is no key"])
        return
    assert said.status == 0, said
    assert (tmp_path / "o" / odd / "config.json").is_file()


@pytest.mark.parametrize("odd", ODD)
def test_a_recipe_may_lie_anywhere(here: Path, odd: str) -> None:
    (here / odd).mkdir()
    (here / odd / f"{odd}.yaml").write_text("rank: 9\n")
    typed = f"recipe=./{odd}/{odd}.yaml"
    assert refusal(here, typed, *UNPROVED) == "rank: the recipe says 9, the adapter has 4"


@pytest.mark.parametrize(
    "typed", ["./sub/mine.yaml", "./sub/mine", "../{}/sub/mine.yaml", "{}/sub/mine.yaml"]
)
def test_a_recipe_file_is_taken_by_any_of_its_paths(here: Path, typed: str) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "mine.yaml").write_text("rank: 9\n")
    path = typed.format(here.name if typed.startswith("..") else here)
    assert refusal(here, f"recipe={path}", *UNPROVED) == "rank: the recipe says 9, the adapter has 4"


def test_home_is_meant_by_a_tilde(here: Path) -> None:
    (here / "mine.yaml").write_text("rank: 4\n")
    arguments = [
        "recipe=~/mine.yaml",
        "base_model=~/base",
        "adapter=~/adapter",
        "output=~/out",
        "report=~/r.json",
    ]
    before = listing(here)
    (elsewhere := here / "elsewhere").mkdir()
    said = answer(*arguments, "verify=none", cwd=elsewhere, env={"HOME": str(here)})
    assert said.status == 0, said
    assert {p.partition("/")[0] for p in listing(here).keys() - before.keys()} == {
        "elsewhere",
        "out",
        "r.html",
        "r.json",
    }


def test_a_reference_on_the_command_line_is_the_users_to_make(here: Path) -> None:
    env = {"MODELS": str(here)}
    said = answer("base_model=${oc.env:MODELS}/base", *ARGUMENTS[1:], "dry_run=true", cwd=here, env=env)
    assert said.status == 0, said


# Recipes


def test_recipes_are_found_from_any_directory(tmp_path: Path) -> None:
    said = run("recipe=llama31", "base_model=nowhere", cwd=tmp_path)
    assert said.returncode == 2
    assert "adapter: './adapters/llama31' does not exist" in said.stderr


def test_a_folder_of_pipeline_recipes_adds_its_recipes_and_shadows_ours(here: Path) -> None:
    (here / "one").mkdir()
    (here / "two" / "deep").mkdir(parents=True)
    (here / "one" / "mine.yaml").write_text("# Only mine.\nrank: 9\n")
    (here / "two" / "mine.yaml").write_text("rank: 10\n")
    (here / "two" / "deep" / "other.yaml").write_text("rank: 11\n")
    (here / "two" / "llama31.yaml").write_text("rank: 12\n")
    env = {"PIPELINE_RECIPES": f"{here / 'one'}{os.pathsep}{here / 'two'}{os.pathsep}{here / 'missing'}"}
    for name, rank in (("mine", 9), ("deep/other", 11), ("llama31", 12)):
        sentence = refusal(here, f"recipe={name}", *UNPROVED, env=env)
        assert sentence == f"rank: the recipe says {rank}, the adapter has 4"
    listed = answer("--help", cwd=here, env=env).out
    assert "mine                       Only mine." in listed
    assert "deep/other" in listed


@pytest.mark.parametrize("order", ["[merge, _self_]", "[below, _self_]", "[_self_, below]"])
def test_a_recipe_builds_on_another_and_later_lines_win(here: Path, order: str) -> None:
    (here / "recipes").mkdir()
    (here / "recipes" / "below.yaml").write_text("rank: 9\nalpha: 5\nmerge: {weight: 0}\n")
    (here / "mine.yaml").write_text(f"defaults: {order}\nrank: 4\nmerge: {{weight: 1}}\n")
    env = {"PIPELINE_RECIPES": str(here / "recipes")}
    said = answer("recipe=./mine.yaml", *UNPROVED, "dry_run=true", cwd=here, env=env)
    wanted = {
        "[merge, _self_]": "",
        "[below, _self_]": "error: alpha: the recipe says 5, the adapter has 8\n",
        "[_self_, below]": "error: rank: the recipe says 9, the adapter has 4\n"
        "error: alpha: the recipe says 5, the adapter has 8\n"
        "error: merge.weight: 0.0 would merge nothing; give a finite factor other than 0\n",
    }[order]
    assert said.err == wanted


def test_a_recipe_builds_on_one_of_ours_that_chooses_stages(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults: [inspect]\nbase_model: base\nadapter: adapter\n")
    said = answer("recipe=./mine.yaml", cwd=here)
    assert said.status == 0, said
    assert f"{Q_PROJ} [32, 32]" in said.out
    assert not (here / "out").exists()


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults: [override /save: both]\nrank: 9\nsave: {dtype: float32}\n")
    assert "rank: the recipe says 9" in refusal(here, "recipe=./mine.yaml", *UNPROVED)
    said = answer("recipe=./mine.yaml", *UNPROVED, "rank=4", "save.dtype=float16", cwd=here)
    assert said.status == 0, said
    assert json.loads((here / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    assert (here / "out" / "adapter" / "adapter_model.safetensors").is_file()


# Sweeps


SWEEP = ("-m", "base_model=base", "adapter=adapter", "output=sweep", "verify=none")


def runs(here: Path) -> list[Path]:
    """The folders of a sweep's runs."""
    return [path for path in (here / "sweep").iterdir() if path.is_dir()]


def test_a_sweep_makes_one_folder_for_each_run_named_by_the_swept_keys(here: Path) -> None:
    before = listing(here)
    said = answer(*SWEEP, "merge_dtype=float32,float64", "save.dtype=bfloat16,float32", cwd=here)
    assert said.status == 0, said
    assert sorted(p.name for p in runs(here)) == [
        f"merge_dtype={merge},save.dtype={save}"
        for merge in ("float32", "float64")
        for save in ("bfloat16", "float32")
    ]
    for folder in runs(here):
        dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
        assert folder.name.endswith(f"save.dtype={dtype}")
    new = listing(here).keys() - before.keys()
    assert {p.partition("/")[0] for p in new} == {"sweep"}
    assert not [p for p in new if "multirun" in p or ".hydra" in p or p.endswith((".yaml", ".log"))]


def test_a_swept_key_may_also_be_a_path(here: Path) -> None:
    write_adapter(here / "other, adapter", adapter_tensors(seed=5))
    others = [a for a in SWEEP if not a.startswith("adapter=")]
    said = answer(*others, "adapter=adapter,'other, adapter'", cwd=here)
    assert said.status == 0, said
    names = sorted(p.name for p in runs(here))
    assert len(names) == 2
    assert all(name.startswith("adapter=") for name in names)


@pytest.mark.parametrize("path", ["with, comma", "a,b"])
def test_a_path_with_a_comma_is_one_path_in_a_sweep_too(here: Path, path: str) -> None:
    write_base(here / path)
    said = answer(*SWEEP, f"base_model={path}", "save.dtype=bfloat16,float32", cwd=here)
    assert said.status == 0, said
    assert sorted(p.name for p in runs(here)) == ["save.dtype=bfloat16", "save.dtype=float32"]


def test_a_failed_run_of_a_sweep_does_not_stop_the_others(here: Path) -> None:
    said = answer(*SWEEP, "rank=9,4,10", cwd=here)
    assert said.status == 1
    assert [p.name for p in runs(here)] == ["rank=4"]
    assert "error: rank: the recipe says 9, the adapter has 4" in said.err
    assert "error: rank: the recipe says 10, the adapter has 4" in said.err
    table = said.out[said.out.rindex("run ") :]
    assert all(f"rank={rank}" in table for rank in (9, 4, 10))


def test_a_sweep_over_a_wrong_value_runs_nothing(here: Path) -> None:
    sentence = refusal(here, *SWEEP, "merge_dtype=float32,half")
    assert "merge_dtype" in sentence
    assert "half" in sentence


def test_a_sweep_of_refused_runs_writes_nothing(here: Path) -> None:
    before = listing(here)
    assert answer(*SWEEP, "rank=9,10", cwd=here).status == 1
    assert listing(here) == before


def test_the_plans_of_a_sweep_write_nothing(here: Path) -> None:
    before = listing(here)
    said = answer(*SWEEP, "save.dtype=bfloat16,float32", "dry_run=true", cwd=here)
    assert said.status == 0
    assert "save.dtype=bfloat16" in said.out
    assert listing(here) == before


# Ends that nobody planned


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 134 MB of zeros (a sparse file) with an adapter on all of it: a run that takes a while."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    size = 4096 * 4096 * 2
    table = {
        f"{name}.weight": {
            "dtype": "BF16",
            "shape": [4096, 4096],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i, name in enumerate(names)
    }
    header = with_header(table, b"")
    (folder / "base").mkdir()
    with (folder / "base" / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * size)
    write_json(folder / "base" / "config.json", llama_config())
    shapes = dict.fromkeys(names, (4096, 4096))
    tensors = adapter_tensors(names, shapes=shapes)
    write_adapter(folder / "adapter", tensors, lora_config(target_modules=["down_proj"]))
    return folder


@pytest.fixture
def halfway(large: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run from `large` into tmp_path/out, stopped (SIGSTOP) while it writes its shard."""
    arguments = [f"base_model={large}/base", f"adapter={large}/adapter", "output=out", "verify=none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments, "merge_dtype=float64"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shard = tmp_path / "out.partial" / "model.safetensors"
        deadline = time.monotonic() + 60
        while not shard.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        assert shard.exists()
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_leaves_nothing(halfway: subprocess.Popen[str], tmp_path: Path) -> None:
    halfway.send_signal(signal.SIGINT)
    halfway.send_signal(signal.SIGCONT)
    _, err = halfway.communicate(timeout=60)
    assert halfway.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert "Traceback" not in err
    assert listing(tmp_path) == {}


def test_a_killed_run_leaves_what_no_loader_takes_for_a_model_and_the_next_run_clears_it_away(
    halfway: subprocess.Popen[str], large: Path, tmp_path: Path
) -> None:
    halfway.kill()
    halfway.wait(timeout=60)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [
        ".unfinished",
        "model.safetensors",
    ]
    arguments = [f"base_model={large}/base", f"adapter={large}/adapter", "output=out", "verify=none"]
    said = answer(*arguments, cwd=tmp_path)
    assert said.status == 0, said
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_run_into_the_same_output_is_refused_and_the_first_goes_on(
    halfway: subprocess.Popen[str], here: Path
) -> None:
    sentence = refusal(here, *UNPROVED)
    assert sentence == "output: another run is writing 'out'; wait for it"
    halfway.send_signal(signal.SIGCONT)
    halfway.communicate(timeout=120)
    assert halfway.returncode == 0
    assert (here / "out" / "config.json").is_file()
    assert not (here / "out.partial").exists()


def test_an_output_that_comes_to_stand_during_the_run_is_not_overwritten(
    halfway: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    halfway.send_signal(signal.SIGCONT)
    _, err = halfway.communicate(timeout=120)
    assert halfway.returncode == 1
    assert "output: 'out' appeared during the run; the result is in out.partial" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "out.partial" / "config.json").is_file()


def test_an_error_of_ours_is_told_in_one_sentence_and_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.save import merged

    def fault(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(merged, "write_shards", fault)
    before = listing(here)
    said = answer(*UNPROVED, cwd=here)
    assert said.status == 1
    assert said.errors == [
        "internal error: IndexError: list index out of range; run again with debug=true and report it"
    ]
    assert listing(here) == before


def test_an_end_after_the_output_stands_does_not_say_that_nothing_was_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import door

    def gone(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")  # `| head` has seen enough

    monkeypatch.setattr(door, "show_report", gone)
    said = answer(*UNPROVED, cwd=here)
    assert (here / "out" / "config.json").is_file()
    assert "nothing was published" not in said.err
