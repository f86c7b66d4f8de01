"""The wheel: all that a run needs is in it, and nothing of the checkout is needed beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.command import ARGUMENTS
from tests.making import write_adapter, write_base

pytestmark = pytest.mark.wheel

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("pipeline", "conf", "recipes", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build folder left in the checkout would get into it."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    call("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=copy)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, is installed."""
    folder = tmp_path_factory.mktemp("target")
    call("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def call(*arguments: str, cwd: Path | None = None) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def installed(target: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with the target first on its path; dependencies come from this environment."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_recipe_runs_from_the_wheel_in_an_empty_directory(target: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    write_base(tmp_path / "base", num_shards=2)
    write_adapter(tmp_path / "adapter")
    code = "import pipeline, pipeline.ground.paths as p; print(pipeline.__file__, p.bundled('recipes'))"
    where = installed(target, "-c", code, cwd=empty).stdout.split()
    assert where == [str(target / "pipeline" / "__init__.py"), str(target / "pipeline" / "recipes")]
    arguments = [a.replace("=", f"={tmp_path}/") for a in ARGUMENTS[:2]]
    said = installed(
        target, "-m", "pipeline", "recipe=merge", *arguments, "output=out", "verify=structure", cwd=empty
    )
    assert said.returncode == 0, said
    assert [p.name for p in empty.iterdir()] == ["out"]
    assert str(CHECKOUT) not in said.stdout + said.stderr


def test_a_program_runs_it_from_the_wheel(target: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    request = {"base_model": "base", "adapter": "adapter", "output": "out", "verify": "structure"}
    code = f"import pipeline; r = pipeline.run({request}, quiet=True); print(r.passed, len(r._repr_html_()))"
    said = installed(target, "-c", code, cwd=tmp_path)
    passed, length = said.stdout.split()
    assert passed == "True"
    assert int(length) > 10_000


def test_the_recipes_are_found_from_the_wheel(target: Path, tmp_path: Path) -> None:
    ours = {p.stem for p in (CHECKOUT / "recipes").glob("*.yaml")}
    listed = installed(target, "-m", "pipeline", "--help", cwd=tmp_path)
    assert listed.returncode == 0, listed
    assert all(f"\n  {name} " in listed.stdout for name in ours)
    near = installed(target, "-m", "pipeline", "recipe=lama31", cwd=tmp_path)
    assert near.returncode == 2
    assert f"did you mean llama31; there are {', '.join(sorted(ours))}" in near.stderr


def test_every_module_and_data_file_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {
        p.relative_to(CHECKOUT).as_posix()
        for p in (CHECKOUT / "pipeline").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    for folder in ("conf", "recipes"):
        wanted |= {
            f"pipeline/{p.relative_to(CHECKOUT).as_posix()}" for p in (CHECKOUT / folder).rglob("*.yaml")
        }
    assert inside == wanted
