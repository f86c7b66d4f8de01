"""What most tests start from."""

from pathlib import Path

import pytest

from tests.making import write_adapter, write_base


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with `base` and `adapter` in it: `command.ARGUMENTS` merges them there into `out`."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    return tmp_path
