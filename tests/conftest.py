"""What most tests start from."""

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: tiny matrices are slower on several, and sums then have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
