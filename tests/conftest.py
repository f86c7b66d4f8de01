"""What most tests start from."""

from pathlib import Path

import pytest

from pipeline.ground import charts
from tests.making import write_adapter, write_base


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with `base` and `adapter` in it: `command.ARGUMENTS` merges them there into `out`."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    return tmp_path


@pytest.fixture(autouse=True)
def no_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take a second, and few tests look at them; those are marked `draws`."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(charts, "drawn", lambda name, draw: "<svg ></svg>")
