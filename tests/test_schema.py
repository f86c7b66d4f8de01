"""report.json and merge.json are what their schemas say: nothing undocumented, nothing documented in vain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pipeline
from pipeline.ground import charts
from pipeline.ground.report import FORMAT
from tests.command import answer
from tests.making import (
    VOCABULARY,
    adapter_tensors,
    base_tensors,
    floats,
    lora_config,
    write_adapter,
    write_base,
)

GROUND = Path(pipeline.__file__).parent / "ground"
SCHEMAS = {
    name: json.loads((GROUND / f"{name}.schema.json").read_text("utf-8")) for name in ("report", "merge")
}
MERGE: dict[str, Any] = {"base_model": "base", "adapter": "adapter"}
FILES = {"verify.tokens": 0}
REPORTS = ("merge.json", "report.json", "report.html")
Node = dict[str, Any]


def write_tokenizer(folder: Path) -> None:
    """One that knows numbers and takes everything else for 0, so that models can be asked something."""
    vocabulary = {str(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1").save_pretrained(folder)


def make() -> None:
    """Runs of every sort in the current folder, each leaving a report."""
    run = partial(pipeline.run, quiet=True)
    write_base(Path("base"))
    write_tokenizer(Path("base"))
    write_adapter(Path("adapter"))
    write_adapter(Path("other"), adapter_tensors(seed=3))
    run(MERGE, output="merged", verify={"tokens": 96, "prompts": "2 3 5"})
    run(MERGE, output="unchecked", verify="none")
    run(MERGE, output="files", verify="structure", save={"dtype": "float16", "rounding": "auto"})
    run(MERGE, output="chance", save={"rounding": "stochastic"}, **FILES)
    run(MERGE, output="codes", save={"quantize": "fp8-channel"}, **FILES)
    run(MERGE, output="simulated", dequantize="simulate", **FILES)
    write_adapter(Path("qlora"), config=lora_config(base_model_name_or_path="org/model-bnb-4bit"))
    run({**MERGE, "adapter": "qlora"}, output="left open", **FILES)
    run(MERGE, output="refused", **FILES, **{"verify.min_retained": 1.5})
    several = [{"path": "adapter", "weight": 0.5}, "other"]
    run({**MERGE, "adapter": several}, output="several", **FILES)
    run("verify", **MERGE, output="merged", report="seen.json", **FILES)
    layers = {"verify.layerwise": "always", "verify.tokens": 32}
    run("verify", **MERGE, output="merged", report="layers.json", **layers)
    run("verify", **MERGE, output="merged", report="thorough.json", verify="thorough", **{"verify.tokens": 0})
    broken = base_tensors()
    broken["model.layers.0.self_attn.q_proj.weight"] = floats("BF16", [[float("nan")] * 32] * 32)
    write_base(Path("elsewhere"), broken)
    run("verify", **MERGE, output="elsewhere", report="broken.json", **FILES)
    tuned = {"base_model": "base", "finetune": "merged", "rank": 4}
    run("extract", **tuned, output="extracted", verify={"tokens": 96})
    run("extract", **tuned, output="extracted by layers", **layers)
    Path("text").write_text(" ".join(str(n * n % VOCABULARY) for n in range(999)))
    run("extract", **tuned, output="by outputs", **{"extract.calibration": "text"}, **FILES)
    run("llama31-extract", **tuned, output="again", **FILES)
    sweep = ("-m", "base_model=base", "adapter=adapter", "verify.tokens=0", "save.dtype=bfloat16,float16")
    assert answer(*sweep, "output=sweep", cwd=Path.cwd()).status == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    with chdir(folder), mock.patch.object(charts, "drawn", lambda name, draw: "<svg ></svg>"):
        make()
    return folder


@pytest.fixture(scope="module")
def told(made: Path) -> dict[str, dict[str, Any]]:
    """What each run has told, by the kind of file and its path."""
    folder = made
    beside = ("seen.json", "layers.json", "thorough.json", "broken.json")
    reports = [*folder.rglob("report.json"), *(folder / name for name in beside)]
    found = {"report": reports, "merge": list(folder.rglob("merge.json"))}
    return {
        kind: {str(path.relative_to(folder)): strictly(path) for path in paths}
        for kind, paths in found.items()
    }


def test_what_a_manifest_lists_is_there(told: dict[str, dict[str, Any]], made: Path) -> None:
    for path, manifest in told["merge"].items():
        folder = (made / path).parent
        listed = {file["name"]: file["num_bytes"] for file in manifest["outputs"]}
        there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        assert listed == {n: size for n, size in there.items() if n not in REPORTS}, path
        assert {"base"} < {file["of"] for file in manifest["inputs"]}, path


def strictly(path: Path) -> Any:
    """A JSON file as readers other than Python's take it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is no JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schema_is_one(kind: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    assert SCHEMAS[kind]["properties"]["format"]["const"] == FORMAT
    assert SCHEMAS[kind]["$id"].endswith(f":{FORMAT}")


@pytest.mark.parametrize("kind", SCHEMAS)
def test_everything_told_is_documented(kind: str, told: dict[str, dict[str, Any]]) -> None:
    assert len(told[kind]) >= 12
    validator = Draft202012Validator(SCHEMAS[kind])
    wrong = {
        path: [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(table)]
        for path, table in told[kind].items()
    }
    assert {path: errors for path, errors in wrong.items() if errors} == {}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_everything_documented_is_told(kind: str, told: dict[str, dict[str, Any]]) -> None:
    schema = SCHEMAS[kind]
    seen = {path for table in told[kind].values() for path in occurring(schema, table, schema)}
    assert {path for path, _, _ in documented(schema, schema)} - seen == set()


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_field_that_nobody_documented_fails(kind: str, told: dict[str, dict[str, Any]]) -> None:
    validator, schema = Draft202012Validator(SCHEMAS[kind]), SCHEMAS[kind]
    places = {path.rpartition("/properties/")[0] for path, _, _ in documented(schema, schema)}
    assert len(places) > 5
    for place in places:
        assert resolved(at(schema, place), schema)["additionalProperties"] is False, place
    table = next(iter(told[kind].values()))
    assert validator.is_valid(table)
    assert not validator.is_valid({**table, "new": 1})


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_field_says_what_it_is_in_what_unit_and_when(kind: str) -> None:
    schema = SCHEMAS[kind]
    for path, node, required in documented(schema, schema):
        assert node.get("description") or resolved(node, schema).get("description"), path
        assert required != ("when" in node), f"{path}: is in all, or says when it is there"
        inner = node.get("items") or node.get("additionalProperties") or {}
        kinds = {*kinds_of(node), *(kinds_of(inner) if isinstance(inner, dict) else ())}
        assert not kinds & {"number", "integer"} or "unit" in node, f"{path}: has no unit"


def kinds_of(node: Node) -> set[str]:
    kind = node.get("type", [])
    return {kind} if isinstance(kind, str) else set(kind)


def resolved(node: Node, schema: Node) -> Node:
    reference = node.get("$ref")
    return at(schema, reference.removeprefix("#")) if reference else node


def at(schema: Node, path: str) -> Any:
    found: Any = schema
    for part in path.split("/")[1:]:
        found = found[part]
    return found


def documented(node: Node, schema: Node, path: str = "") -> Iterator[tuple[str, Node, bool]]:
    """(path, description, whether all have it) of every property at every depth."""
    node = resolved(node, schema)
    for key, inner in node.get("properties", {}).items():
        own = f"{path}/properties/{key}"
        yield own, inner, key in node.get("required", ())
        yield from documented(inner, schema, own)
    for key in ("items", "additionalProperties"):
        if isinstance(inner := node.get(key), dict):
            yield from documented(inner, schema, f"{path}/{key}")


def occurring(node: Node, value: Any, schema: Node, path: str = "") -> Iterator[str]:
    """The paths of `documented` that a value has something at."""
    node = resolved(node, schema)
    rest = node.get("additionalProperties")
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in node.get("properties", {}):
                own = f"{path}/properties/{key}"
                yield own
                yield from occurring(node["properties"][key], inner, schema, own)
            elif isinstance(rest, dict):
                yield from occurring(rest, inner, schema, f"{path}/additionalProperties")
    elif isinstance(value, list) and isinstance(node.get("items"), dict):
        for inner in value:
            yield from occurring(node["items"], inner, schema, f"{path}/items")
