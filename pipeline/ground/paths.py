"""Where our own data folders are: inside the wheel if they were packed there, else beside the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """The folder `name` (conf, recipes)."""
    packed = PACKAGE / name
    return packed if packed.is_dir() else PACKAGE.parent / name
