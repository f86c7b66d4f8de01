"""The house: floors, slots and files stand as the design says, and nothing grows past its size."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline import compose, recipe_source, stage
from pipeline.ground.paths import bundled
from tests.command import ARGUMENTS, run

HOUSE = Path(pipeline.__file__).parent
FILES = sorted(path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*.py"))
DOOR = {
    "__main__",
    "api",
    "arguments",
    "bisection",
    "compose",
    "door",
    "help",
    "publishing",
    "recipe_source",
    "refusing",
    "running",
    "sentences",
    "sweep",
    "telling",
}
CONTRACT = {
    "dequantizing",
    "extraction",
    "loading",
    "merging",
    "output",
    "settings",
    "simulated",
    "stage",
    "verification",
    "weight",
}
FLOORS = ["ground", "contract", "stages", "door"]  # from below
HEAVY = {"torch", "transformers", "peft", "gguf", "tokenizers", "matplotlib"}

stage.load_stages()
STAGE_FILES = sorted(
    path.relative_to(HOUSE / "stages").with_suffix("").as_posix()
    for path in (HOUSE / "stages").glob("*/*.py")
    if path.name != "__init__.py"
)


def tree(file: str) -> ast.Module:
    return ast.parse((HOUSE / file).read_text("utf-8"))


def imported(node: ast.AST, file: str) -> Iterator[str]:
    """The modules that an import statement names, in full."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["pipeline", *Path(file).parent.parts]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def all_imports(file: str) -> set[str]:
    return {name for node in ast.walk(tree(file)) for name in imported(node, file)}


def floor(module: str) -> str:
    """The floor of a module of ours, pipeline.ground.files or pipeline.stage."""
    first = module.split(".")[1]
    if first in DOOR:
        return "door"
    if first in CONTRACT:
        return "contract"
    assert first in ("stages", "ground"), f"pipeline.{first} belongs to no floor"
    return first


def ours(modules: set[str]) -> set[str]:
    """Those that are modules of ours, not names within one."""
    return {m for m in modules if m.startswith("pipeline.") and is_module(m)}


def is_module(name: str) -> bool:
    path = HOUSE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def own_name(file: str) -> str:
    return ".".join(["pipeline", *Path(file).with_suffix("").parts])


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from module_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ClassDef):
            yield from module_level(node.body)
            yield from module_level(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from module_level(handler.body)
        else:
            yield node


@pytest.mark.parametrize("file", [f for f in FILES if f != "__init__.py"])
def test_imports_go_one_way(file: str) -> None:
    own = own_name(file)
    here = FLOORS.index(floor(own))
    upward = {m for m in ours(all_imports(file)) if FLOORS.index(floor(m)) > here}
    assert not upward, f"{own} reaches up to {upward}"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("stages/")])
def test_no_stage_knows_another_slots_stages(file: str) -> None:
    if file == "stages/__init__.py":
        assert not ours(all_imports(file))
        return
    slot = file.split("/")[1]
    others = {
        m for m in ours(all_imports(file)) if m.startswith("pipeline.stages.") and m.split(".")[2] != slot
    }
    assert not others


_OF_IT = ("ground/formulas/", "ground/retraced/", "verification/retracing.py")
SECOND_PATH = [f for f in FILES if f.startswith(_OF_IT)]
FIRST_PATH = ("ground.deltas", "ground.adapter_keys", "ground.adapter_format", "ground.module_names")
FIRST_PATH += ("ground.canonical_names", "ground.belongings", "ground.targets", "ground.target_rules")
FIRST_PATH += ("ground.entries", "merging")
SHARED = {  # of modules that have a part in the merge: data, and what draws DARE's masks
    "pipeline.ground.combining": {"Combination", "MajoritySign"},
    "pipeline.ground.selecting": {"AtRandom", "Spot"},
}


@pytest.mark.parametrize("file", SECOND_PATH)
def test_the_second_path_shares_nothing_with_the_first(file: str) -> None:
    names = all_imports(file)
    first = tuple(f"pipeline.{module}" for module in FIRST_PATH)
    assert not [n for n in names if f"{n}.".startswith(tuple(f"{module}." for module in first))]
    for module, data in SHARED.items():
        assert {n.removeprefix(f"{module}.") for n in names if n.startswith(f"{module}.")} <= data


@pytest.mark.parametrize("file", [f for f in SECOND_PATH if f.startswith("ground/")])
def test_nothing_beneath_the_second_path_leads_to_the_first(file: str) -> None:
    seen: set[str] = set()
    to_see = {own_name(file)}
    while to_see:
        module = to_see.pop()
        seen.add(module)
        path = "/".join(module.split(".")[1:])
        known = path + ".py" if path + ".py" in FILES else f"{path}/__init__.py"
        if known in FILES:
            to_see |= {m for m in ours(all_imports(known)) if m not in SHARED} - seen
    first = {m for m in seen for f in FIRST_PATH if f"{m}.".startswith(f"pipeline.{f}.")}
    assert not first


def test_these_files_alone_know_hydra() -> None:
    found = {f for f in FILES for m in all_imports(f) if m.split(".")[0] in ("hydra", "omegaconf")}
    hydra = {"__main__.py", "api.py", "compose.py", "recipe_source.py", "refusing.py", "running.py"}
    assert found == hydra


@pytest.mark.parametrize("file", FILES)
def test_nothing_heavy_is_imported_with_a_module(file: str) -> None:
    names = {m for node in module_level(tree(file).body) for m in imported(node, file)}
    assert not {name for name in names if name.split(".")[0] in HEAVY}


def test_module_level_sees_what_runs_at_import_and_only_that() -> None:
    code = """
if TYPE_CHECKING:
    import a
else:
    import b
try:
    import c
except ImportError:
    import d
class X:
    import e
def f():
    import g
"""
    found = {m for node in module_level(ast.parse(code).body) for m in imported(node, "x.py")}
    assert found == {"b", "c", "d", "e"}


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_longer_than_300_lines(file: str) -> None:
    assert len((HOUSE / file).read_text("utf-8").splitlines()) <= 300


def test_no_file_is_named_for_nothing() -> None:
    words = {"utils", "util", "common", "core", "helpers", "helper", "misc"}
    assert not [f for f in FILES if words & set(Path(f).with_suffix("").parts)]


@pytest.mark.parametrize("file", STAGE_FILES)
def test_what_is_typed_is_where_it_lives(file: str) -> None:
    slot, name = file.split("/")
    module = f"pipeline.stages.{slot}.{name}"
    registered = stage.STAGES[slot].get(name)
    chooser = stage.CHOICES.get(slot) if name == "auto" else None
    found = registered or chooser
    assert found is not None, f"{file}.py registers neither a stage nor a choice of its name"
    assert found.__module__ == module


def test_every_stage_lives_in_a_file_of_its_name() -> None:
    names = {f"{slot}/{name}" for slot, stages in stage.STAGES.items() for name in stages}
    names |= {f"{slot}/auto" for slot in stage.CHOICES}
    assert names == set(STAGE_FILES)


def test_every_stage_and_setting_has_its_sentence() -> None:
    from dataclasses import fields

    from pipeline.help import field_docs

    for slot, stages in stage.STAGES.items():
        for name, cls in stages.items():
            assert (cls.__doc__ or "").strip(), f"{slot}={name} does not say what it is"
            assert not (cls.__doc__ or "").startswith(f"{cls.__name__}("), f"{slot}={name}: no docstring"
            documented = {doc for base in cls.__mro__[:-1] for doc in field_docs_of(base, field_docs)}
            assert not {f.name for f in fields(cls)} - documented, f"{slot}={name}"


def field_docs_of(cls: type, field_docs: object) -> set[str]:
    assert callable(field_docs)
    return set(field_docs(cls)) if cls.__module__.startswith("pipeline") else set()


def test_every_key_has_its_sentence() -> None:
    from pipeline.help import field_docs

    assert not set(compose.ROOT_KEYS) - set(field_docs(compose.Root))


def recipes() -> list[str]:
    root = bundled("recipes")
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_composes_and_builds(name: str) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    compose.register()
    recipe_source.register()
    given = ["base_model=base", "adapter=adapter", "output=out"]
    with initialize_config_dir(str(bundled("conf")), version_base="1.3"):
        built = compose.build(hydra_compose("config", [f"recipe={name}", *given]))
    for slot, base in stage.SLOTS.items():
        assert isinstance(getattr(built, slot), base)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_what_it_is_for_and_how_to_run_it(name: str) -> None:
    lines = (bundled("recipes") / f"{name}.yaml").read_text("utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[0].startswith("# ")
    assert any(f"recipe={name}" in line for line in comment)


# Packages that add stages


PLUGIN = '''
"""Merges nothing, slowly."""

from dataclasses import dataclass

from pipeline.stage import Merge, stage


@stage("nothing")
@dataclass(frozen=True, kw_only=True)
class Nothing(Merge):
    """The base as it is."""

    patience: int = 3
    """minutes that nothing takes"""

    def __call__(self, base, adapter):
        return base
'''


def install(site: Path, code: str, name: str = "tiny_stages") -> dict[str, str]:
    """What pip would have put into site-packages; the environment that finds it there."""
    site.mkdir()
    (site / f"{name}.py").write_text(code)
    (info := site / f"{name}-1.0.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pipeline.stages]\ntiny = {name}\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}


def test_an_installed_package_adds_a_stage_with_its_settings(here: Path, tmp_path: Path) -> None:
    env = install(tmp_path / "site", PLUGIN)
    listed = run("--help", cwd=here, env=env).stdout
    assert "  nothing                    The base as it is." in listed
    assert "    merge.patience           minutes that nothing takes" in listed
    said = run(*ARGUMENTS, "merge=nothing", "merge.patience=1", "verify=structure", cwd=here, env=env)
    assert said.returncode == 0, said
    assert (here / "out" / "model.safetensors").read_bytes() == (
        here / "base" / "model.safetensors"
    ).read_bytes()
    wrong = run(*ARGUMENTS, "merge=noting", cwd=here, env=env)
    choices = ", ".join(sorted([*stage.STAGES["merge"], "nothing"]))
    assert wrong.stderr == f"error: merge: no stage 'noting'; choose {choices}\n"
    unknown = run(*ARGUMENTS, "merge=nothing", "merge.weight=1", cwd=here, env=env)
    assert unknown.stderr.startswith("error: merge.weight: no such key")


@pytest.mark.parametrize(
    "code",
    ["import nowhere_to_be_found\n", PLUGIN.replace('"nothing"', '"exact"'), "1 / 0\n"],
    ids=["import", "taken", "fault"],
)
def test_a_package_that_does_not_load_is_named_in_one_sentence(here: Path, tmp_path: Path, code: str) -> None:
    env = install(tmp_path / "site", code)
    said = run(*ARGUMENTS, "dry_run=true", cwd=here, env=env)
    assert said.returncode in (1, 2)
    assert "Traceback" not in said.stderr
    assert "tiny" in said.stderr


def test_a_package_is_not_loaded_for_what_a_recipe_says(here: Path, tmp_path: Path) -> None:
    # The same module without an entry point: on the path, and still no name reaches it.
    site = tmp_path / "site"
    env = install(site, f"open({str(here / 'pwned')!r}, 'w')\n")
    (site / "tiny_stages-1.0.dist-info" / "entry_points.txt").unlink()
    choices = ", ".join(sorted(stage.STAGES["merge"]))
    for name in ("tiny_stages", "tiny_stages.Nothing"):
        said = run(*ARGUMENTS, f"merge={name}", cwd=here, env=env)
        assert said.stderr == f"error: merge: no stage '{name}'; choose {choices}\n"
    assert not (here / "pwned").exists()


def test_the_package_is_typed_and_its_version_known() -> None:
    from pipeline.ground.manifest import own_version

    assert (HOUSE / "py.typed").is_file()
    assert own_version() != "unknown"


def test_the_console_script_is_the_same_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lora-pipeline")
    said = subprocess.run([script, "base_modle=x"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (2, "error: base_modle: no such key; did you mean base_model\n")
