"""Recipes from a stranger: whatever is more than data is refused, in one sentence, before anything is done.

The rows of section 2 of the security page (what Hydra does with a composed config before the application
runs), defaults lists that reach for more than recipes, and YAML that is no recipe.
"""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.ground.paths import bundled
from tests.command import ARGUMENTS, answer, listing, refusal, refused, run

BUNDLED = ", ".join(sorted(path.stem for path in bundled("recipes").glob("*.yaml")))
PLAN = (*ARGUMENTS, "verify=none", "dry_run=true")


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def recipe_refusal(folder: Path, text: str, *arguments: str) -> str:
    write(folder, text)
    return refusal(folder, "recipe=./mine.yaml", *(arguments or PLAN))


# What a recipe may not say


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hydra: {callbacks: {note: {_target_: pathlib.Path.touch, _args_: [pwned]}}}", "'hydra'"),
        ("hydra.callbacks.note._target_: pathlib.Path.touch", "'hydra.callbacks.note._target_'"),
        ("hydra: {job_logging: {handlers: {file: {filename: pwned.log}}}}", "'hydra'"),
        ("hydra: {run: {dir: pwned}}", "'hydra'"),
        ("hydra: {sweep: {dir: pwned}}", "'hydra'"),
        ("hydra: {output_subdir: pwned}", "'hydra'"),
        ("hydra: {job: {env_set: {HF_ENDPOINT: 'http://example.org'}}}", "'hydra'"),
        ("hydra: {job: {chdir: true}}", "'hydra'"),
        ("hydra: {searchpath: ['file:///tmp']}", "'hydra'"),
        ("hydra: null", "'hydra'"),
        ("merge: {_target_: os.system}", "'merge._target_'"),
        ("_target_: os.system", "'_target_'"),
        ("_recursive_: false", "'_recursive_'"),
        ("names: {a: b, _partial_: true}", "'names._partial_'"),
        ("targeted_modules: [{_target_: os.system}]", "'targeted_modules[0]._target_'"),
    ],
)
def test_hydras_own_settings_and_python_names_are_no_recipes_to_set(
    here: Path, text: str, named: str
) -> None:
    sentence = recipe_refusal(here, text)
    assert "mine.yaml: " in sentence
    assert f"{named} is not a recipe's to set" in sentence
    assert "'- override /merge: exact' under defaults" in sentence


RESOLVERS = [
    "hub/${oc.env:SECRET}",
    "${oc.env:SECRET,none}",
    "a\\\\${oc.env:SECRET}",
    "${oc.decode:'${oc.env:SECRET}'}",
    "${hydra:runtime.cwd}",
    "${oc.create:{a: 1}}",
    "${ oc.env : SECRET }",
    "${oc.env:${names.secret}}",
    "${${report}:SECRET}",
    "${oc.${device}:SECRET}",
    "${${report}:${names.secret}}",
]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("base_model", value) for value in RESOLVERS),
        *((key, value) for key in ("names.x", "targeted_modules.0") for value in RESOLVERS[:9:8]),
    ],
)
def test_a_resolver_is_not_called(here: Path, key: str, value: str) -> None:
    # report, device and names hold what the last few put a resolver's name together from
    recipe = {
        "base_model": value if key == "base_model" else "base",
        "names": {"secret": "SECRET", "x": value if key == "names.x" else "y"},
        "targeted_modules": [value if key == "targeted_modules.0" else "q_proj"],
        "report": "oc.env",
        "device": "env",
    }
    write(here, json.dumps(recipe))  # JSON is YAML
    arguments = ("recipe=./mine.yaml", "adapter=adapter", "output=out", "verify=none", "dry_run=true")
    sentences = refused(here, *arguments, env={"SECRET": "hunter2"})
    assert not any("hunter2" in sentence for sentence in sentences), sentences
    assert any("calls a resolver; write the value" in sentence for sentence in sentences), sentences


def test_a_plain_reference_to_another_key_is_data(here: Path) -> None:
    write(here, "base_model: ${adapter}/../base\nadapter: adapter\noutput: out")
    assert answer("recipe=./mine.yaml", "verify=none", "dry_run=true", cwd=here).status == 0


@pytest.mark.parametrize("value", ["${base_model}", "${nokey}", "${hydra.job.name}", "${merge}"])
def test_a_reference_that_leads_nowhere_names_its_key(here: Path, value: str) -> None:
    sentence = recipe_refusal(here, f"base_model: {value}", "adapter=adapter", "output=out", "dry_run=true")
    assert "base_model: " in sentence, sentence


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:os.system ['touch pwned']",
        "!anything x",
    ],
)
def test_a_yaml_tag_makes_no_python_object(here: Path, tag: str) -> None:
    sentence = recipe_refusal(here, f"base_model: {tag}")
    assert "mine.yaml: is not a recipe in YAML" in sentence
    assert "could not determine a constructor for the tag" in sentence


def test_a_package_header_moves_nothing_into_hydras_settings(here: Path) -> None:
    assert recipe_refusal(here, "# @package hydra\nrun: {dir: pwned}").startswith("run: no such key")


# defaults


@pytest.mark.parametrize(
    "entry",
    [
        "override /hydra/launcher: joblib",
        "override /hydra/job_logging: default",
        "override hydra/launcher: joblib",
        "override /hydra: x",
        "../conf/config",
        "/conf/config",
        "/hydra/job_logging/default",
        "/etc/passwd",
        "./mine",
        "~/recipe",
        "a/../../conf/config",
        "'file:///etc/passwd'",
        "'pkg://hydra.conf'",
        "'${oc.env:HOME}'",
        "merge@hydra",
        "merge@_global_.hydra",
        "optional merge",
        "merge: exact",
        "/merge: exact",
        "override merge: exact",
        "override /merge@hydra: exact",
        "override /merge: ../../conf/config",
        "override /merge: '${save}'",
        "override /merge: [exact]",
        "override /merge: null",
        "{override /merge: exact, override /save: merged}",
        "null",
        "3",
        "[merge]",
    ],
)
def test_defaults_hold_recipes_by_name_and_overrides_of_slots_alone(here: Path, entry: str) -> None:
    sentence = recipe_refusal(here, f"defaults:\n  - {entry}\n  - _self_\n")
    assert "mine.yaml: defaults entry " in sentence
    assert "is neither another recipe's name nor '- override /slot: name'" in sentence


@pytest.mark.parametrize("value", ["merge", "{merge: exact}", "3", "'../conf/config'"])
def test_defaults_are_a_list(here: Path, value: str) -> None:
    assert "mine.yaml: defaults" in recipe_refusal(here, f"defaults: {value}")


def test_defaults_within_a_slot_are_an_unknown_key(here: Path) -> None:
    sentence = recipe_refusal(here, "merge: {defaults: [../conf/config]}")
    assert sentence.startswith("merge.defaults: no such key")


@pytest.mark.parametrize("name", ["config", "root", "mergee"])
def test_a_recipe_builds_on_recipes_only(here: Path, name: str) -> None:
    sentence = recipe_refusal(here, f"defaults: [{name}]")
    assert f"recipe: no recipe '{name}'" in sentence
    assert f"there are {BUNDLED}" in sentence


def test_an_override_of_something_that_is_no_slot_is_refused(here: Path) -> None:
    sentence = recipe_refusal(here, "defaults: [override /mrege: exact]")
    assert sentence == "mrege: no such key; did you mean merge"


def test_an_override_of_the_recipe_itself_is_refused(here: Path) -> None:
    assert "recipe" in recipe_refusal(here, "defaults: [override /recipe: verify]")


@pytest.mark.parametrize("text", ["defaults: [turns]", "defaults: [other]"])
def test_recipes_that_build_on_themselves_are_refused(here: Path, text: str) -> None:
    write(here, text, "recipes/turns.yaml")
    write(here, "defaults: [turns]", "recipes/other.yaml")
    sentence = refusal(here, "recipe=turns", *PLAN, env={"PIPELINE_RECIPES": str(here / "recipes")})
    assert "turns" in sentence


def test_a_recipe_chooses_stages_by_name(here: Path) -> None:
    sentence = recipe_refusal(here, "defaults: [override /merge: ties2]")
    assert (
        sentence
        == "merge: no stage 'ties2'; choose dare_linear, dare_ties, exact, linear, magnitude_prune, ties"
    )


# Keys and values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base_modle: x", "base_modle: no such key; did you mean base_model"),
        ("merge: {wieght: 2}", "merge.wieght: no such key; did you mean merge.weight"),
        ("save: {dtyp: bfloat16}", "save.dtyp: no such key; did you mean save.dtype"),
        ("save: {dtype: bfloat16, max_shard_sise: 5GB}", "save.max_shard_sise: no such key; did you mean"),
        ("load: {trust_remote_code: true}", "load.trust_remote_code: no such key"),
        ("verify: {prompts: hello}", "verify.prompts: no such key"),  # verify=none has none
        ("trust_remote_code: true", "trust_remote_code: no such key"),
        ("merge: {weight: 2, nested: {deep: 1}}", "merge.nested: no such key"),
        ("3: 4", "3: no such key"),
        ("true: 4", "True: no such key"),
    ],
)
def test_an_unknown_key_is_refused_at_every_level(here: Path, text: str, sentence: str) -> None:
    assert recipe_refusal(here, text).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("~merge: null", ["merge", "no such key"]),
        ("+merge: {x: 1}", ["+merge", "no such key"]),
        ("+merge._target_: os.system", ["_target_"]),
        ("merge: null", ["merge: ", "None", "override /merge: NAME"]),
        ("merge: 3", ["merge: ", "3"]),
        ("merge: exact", ["merge: ", "'exact'", "override /merge: exact"]),
        ("merge: ${save}", ["merge: "]),
        ("merge: [exact]", ["merge: "]),
        ("names: 3", ["names: ", "3"]),
        ("names: {a: {b: c}}", ["names", "{'b': 'c'}"]),
        ("rank: four", ["rank: ", "'four'"]),
        ("alpha: lots", ["alpha: ", "'lots'"]),
        ("dry_run: perhaps", ["dry_run: ", "'perhaps'"]),
        ("merge_dtype: bf16", ["merge_dtype: ", "'bf16'", "float64, float32, bfloat16, float16"]),
        ("save: {dtype: int8}", ["save.dtype: ", "'int8'", "keep, bfloat16, float16, float32"]),
        ("save: {dtype: {x: 1}}", ["save.dtype: "]),
        ("save: {max_shard_size: huge}", ["save.max_shard_size: 'huge' is not a size", "5GB"]),
        ("merge: {weight: two}", ["merge.weight: ", "'two'"]),
        ("merge: {weight: .nan}", ["merge.weight: nan", "finite"]),
        ("merge: {weight: 0}", ["merge.weight: 0.0 would merge nothing"]),
        ("base_model: [a, b]", ["base_model: "]),
        ("adapter: {path: a}", ["adapter: "]),
        ("output: {}", ["output: "]),
        ("memory_limit: lots", ["memory_limit: 'lots' is not a size"]),
        ("device: cude", ["device: 'cude' is none of auto, cpu, cuda"]),
        ("targeted_modules: 3", ["targeted_modules: 3 is not a list of module names", "[q_proj, v_proj]"]),
        ("targeted_modules: {filtre: a}", ["targeted_modules: {'filtre': 'a'} is not a list"]),
        ("targeted_modules: ['re:(']", ["targeted_modules: ", "re:(", "regular expression"]),
        ("report: nowhere/report.json", ["report: 'nowhere' is not a folder"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_key_and_value(
    here: Path, text: str, parts: list[str]
) -> None:
    write(here, text)
    key = text.split(":")[0]
    others = [a for a in PLAN if not a.startswith(f"{key}=")]
    sentence = refusal(here, "recipe=./mine.yaml", *others)
    assert all(part in sentence for part in parts), sentence
    assert "ValidationError" not in sentence


# Files that are no recipes


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- a\n- b\n", ["is a list; a recipe is a table of keys"]),
        ("a: [1,\n", ["is not a recipe in YAML", "line 2"]),
        ("rank: 4\nrank: 5\n", ["is not a recipe in YAML", "duplicate key rank"]),
        ("---\nrank: 3\n---\nrank: 4\n", ["is not a recipe in YAML", "single document"]),
        ("base_model: !!set {a, b}\n", ["is not a recipe in YAML"]),
        ("# " + "x" * 300_000, ["is larger than a recipe may be (262144 bytes)"]),
        ("names: " + "{a: " * 3000 + "1" + "}" * 3000, ["is not a recipe in YAML"]),
    ],
    ids=["list", "broken", "twice", "documents", "set", "long", "deep"],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(here: Path, text: str, parts: list[str]) -> None:
    sentence = recipe_refusal(here, text)
    assert "mine.yaml: " in sentence
    assert all(part in sentence for part in parts), sentence


def test_bytes_that_are_no_text_are_refused_by_name(here: Path) -> None:
    (here / "mine.yaml").write_bytes(b"\xff\xfe\x00rank")
    sentence = refusal(here, "recipe=./mine.yaml", *PLAN)
    assert "mine.yaml: is not a recipe in YAML" in sentence


def test_one_word_is_no_recipe(here: Path) -> None:
    assert "hello" in recipe_refusal(here, "hello\n")


def bomb(here: Path, text: str) -> str:
    """What is said of a page of YAML that means gigabytes."""
    write(here, text)
    before, begun = listing(here), time.monotonic()
    said = run("recipe=./mine.yaml", *PLAN, cwd=here, timeout=15)
    assert time.monotonic() - begun < 10
    assert (said.returncode, listing(here)) == (2, before)
    return said.stderr


def test_an_alias_bomb_is_refused_at_once(here: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefgh")]
    assert "mine.yaml: repeats a part by a YAML alias" in bomb(here, "\n".join(lines))


def test_references_that_multiply_are_refused_at_once(here: Path) -> None:
    lines = ["names:", "  a: xxxxxxxxxx"]
    lines += [f"  {b}: '{f'${{names.{a}}}' * 10}'" for a, b in pairwise("abcdefgh")]
    assert "error: " in bomb(here, "\n".join(lines))


@pytest.mark.parametrize("pattern", ["'*_proj'", "layers.*.self_attn", "re:.*_proj", "self_attn # *all*"])
def test_an_asterisk_in_a_value_is_no_alias(here: Path, pattern: str) -> None:
    write(here, f"targeted_modules:\n  - {pattern}\n")
    assert answer("recipe=./mine.yaml", *PLAN, cwd=here).status == 0


# Names


def test_a_recipe_that_is_not_there_lists_the_near_name_and_all_names(here: Path) -> None:
    sentence = refusal(here, "recipe=lama31", *PLAN)
    assert sentence == (f"recipe: no recipe 'lama31'; did you mean llama31; there are {BUNDLED}")


@pytest.mark.parametrize("name", ["./nowhere.yaml", "nowhere/mine.yaml", "../nowhere.yaml"])
def test_a_recipe_file_that_is_not_there_is_named_as_typed(here: Path, name: str) -> None:
    sentence = refusal(here, f"recipe={name}", *PLAN)
    assert sentence.startswith("recipe: ")
    assert name.removesuffix(".yaml") in sentence


@pytest.mark.parametrize("name", ["./adapter", "../../conf/config", "~nobody/recipe"])
def test_a_path_that_is_no_recipe_file_is_named_as_typed(here: Path, name: str) -> None:
    assert f"'{name}'" in refusal(here, f"recipe={name}", *PLAN)


@pytest.mark.parametrize("value", ["", "null"])
def test_an_empty_recipe_name_is_told_with_the_names(here: Path, value: str) -> None:
    sentence = refusal(here, f"recipe={value}", *PLAN)
    assert sentence.startswith("recipe: ")
    assert "llama31" in sentence


@pytest.mark.parametrize("up", [1, 2, 30])
def test_a_path_upwards_is_screened_and_means_the_file_from_here(here: Path, up: int) -> None:
    # Hydra's own sources also answer paths, relative to conf/: 30 times ../ is the root for both.
    deep = here / "deep" / "deeper"
    deep.mkdir(parents=True)
    hostile = write(here, "hydra: {callbacks: {note: {_target_: pathlib.Path.touch}}}", "deep/mine.yaml")
    if up == 2:
        hostile = hostile.rename(here / "mine.yaml")
    path = "../" * up + (str(hostile).lstrip("/") if up == 30 else "mine.yaml")
    before = listing(here)
    said = answer(f"recipe={path}", "base_model=x", "adapter=y", "output=z", cwd=deep)
    assert (said.status, listing(here)) == (2, before)
    assert "mine.yaml: 'hydra' is not a recipe's to set" in said.err


def test_our_own_conf_is_screened_like_any_file_when_it_is_given_as_a_recipe(here: Path) -> None:

    sentence = refusal(here, f"recipe={bundled('conf') / 'config.yaml'}", *PLAN)
    assert "config.yaml: defaults entry" in sentence


def test_a_recipe_that_may_not_be_read_is_refused_by_name(here: Path) -> None:
    path = write(here, "rank: 4")
    path.unlink()
    path.symlink_to(path)  # a loop: a file that no one, root included, can read
    sentence = refusal(here, "recipe=./mine.yaml", *PLAN)
    assert "mine" in sentence


def test_every_attack_left_the_environment_alone(here: Path) -> None:
    endpoint = os.environ.get("HF_ENDPOINT")
    recipe_refusal(here, "hydra: {job: {env_set: {HF_ENDPOINT: 'http://example.org'}}}")
    assert os.environ.get("HF_ENDPOINT") == endpoint
