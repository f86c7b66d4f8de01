"""What stands in a workplace outlives runs that end early, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.workplace import Workplace, partial, standing


def begun(output: Path, resumes: bool = True) -> Workplace:
    """A workplace where something stands, and something half made lies beside it."""
    place = Workplace(output, resumes)
    place.__enter__()
    standing(output).mkdir(exist_ok=True)
    (standing(output) / "done").write_text("done")
    (place.folder / "model.safetensors").write_text("half")
    return place


def ended(place: Workplace, error: BaseException | None) -> list[str]:
    """The names in the partial folder afterwards."""
    place.__exit__(type(error) if error else None, error, None)
    return sorted(path.name for path in place.folder.iterdir()) if place.folder.exists() else []


def test_what_stands_outlives_a_failure_and_is_found_again(tmp_path: Path) -> None:
    output = tmp_path / "deep/out"
    place = begun(output)
    assert ended(place, KeyboardInterrupt()) == [".standing", ".unfinished"]
    assert place.is_kept
    with pytest.raises(ValueError, match="x"), Workplace(output, resumes=True):
        assert [path.name for path in standing(output).iterdir()] == ["done"]
        raise ValueError("x")
    assert standing(output).is_dir()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refused_request_leaves_nothing(tmp_path: Path, wrapped: bool) -> None:
    error: PipelineError = Refused("rank: wrong")
    if wrapped:
        error, error.__cause__ = PipelineError("the run failed"), error
    assert ended(begun(tmp_path / "deep/out"), error) == []
    assert not (tmp_path / "deep").exists()


def test_a_run_that_resumes_nothing_keeps_nothing(tmp_path: Path) -> None:
    ended(begun(tmp_path / "out"), ValueError())
    with Workplace(tmp_path / "out"):
        assert not standing(tmp_path / "out").exists()
    assert not partial(tmp_path / "out").exists()


@pytest.mark.parametrize("judgement", ["publish", "reject"])
def test_an_output_that_is_whole_holds_nothing_of_it(tmp_path: Path, judgement: str) -> None:
    place = begun(tmp_path / "out")
    stands_at = getattr(place, judgement)()
    assert ended(place, None) == []
    assert not place.is_kept
    assert [path.name for path in stands_at.iterdir()] == ["model.safetensors"]


def test_nobody_takes_it_while_a_run_is_at_it(tmp_path: Path) -> None:
    place = begun(tmp_path / "out")
    with pytest.raises(Refused, match="another run is writing"), Workplace(tmp_path / "out"):
        pass
    assert ended(place, ValueError()) == [".standing", ".unfinished"]
