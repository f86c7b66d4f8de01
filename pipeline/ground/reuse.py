"""What runs of one sweep have in common, computed by the first that needs it and read by the others.

It lies in a scratch folder of the sweep, one file for each result, under a digest of all that the result
depends on. A file appears whole, by a rename: no run waits for another, and two that need the same thing
at the same time both compute it. Outside a sweep nothing is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8 << 30  # bytes that are kept, and of the disk's free space not more than a quarter
_FOLDER: ContextVar[Path | None] = ContextVar("reuse", default=None)


class Result(NamedTuple):
    """Tensors, and what JSON can hold."""

    tensors: Sequence[Tensor]
    told: Sequence[Any] = ()


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Results are kept in this folder, and looked for there, while `with` lasts."""
    before = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(before)


Key = Callable[[], str | None]  # asked for in a sweep alone


def result(key: Key, make: Callable[[], Result]) -> Result:
    """What an earlier run has made under this key, else what `make` gives; without a key always that."""
    path = _path(key, "safetensors")
    if path is None:
        return make()
    found = _read(path)
    if found is None:
        found = make()
        _keep(path, found)
    return found


def _path(key: Key, kind: str) -> Path | None:
    folder = _FOLDER.get()
    name = key() if folder else None
    return folder / f"{name}.{kind}" if folder and name else None


def _read(path: Path) -> Result | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as held:
            told = json.loads(held.metadata()["told"])
            tensors = [held.get_tensor(str(number)) for number in range(len(held.keys()))]
    except (OSError, SafetensorError):  # not made yet, or gone to make room
        return None
    with suppress(OSError):
        os.utime(path)  # it was of use just now
    return Result(tensors, told)


def _keep(path: Path, found: Result) -> None:
    """Puts it there if there is room, in place of what was of no use for the longest time."""
    from safetensors.torch import save_file

    tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(found.tensors)}
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    _put(path, needed, lambda whole: save_file(tensors, whole, {"told": json.dumps(found.told)}))


def text(key: Key, make: Callable[[], str]) -> str:
    """The same for a line of text."""
    path = _path(key, "txt")
    if path is None:
        return make()
    with suppress(OSError):
        return path.read_text("utf-8")
    made = make()
    _put(path, len(made), lambda whole: whole.write_text(made, "utf-8"))
    return made


def _put(path: Path, needed: int, write: Callable[[Path], object]) -> None:
    with suppress(OSError):  # a full disk, a sweep that has ended: the run goes on without
        path.parent.mkdir(parents=True, exist_ok=True)
        if _makes_room(path.parent, needed):
            with tempfile.TemporaryDirectory(dir=path.parent) as making:
                write(whole := Path(making) / path.name)
                whole.replace(path)


def _makes_room(place: Path, needed: int) -> bool:
    kept = {path: path.stat() for path in place.iterdir() if path.is_file()}
    used = sum(stat.st_size for stat in kept.values())
    most = min(MOST, (shutil.disk_usage(place).free + used) // 4)
    if needed > most:
        return False
    for path in sorted(kept, key=lambda path: kept[path].st_mtime_ns):
        if used + needed <= most:
            break
        used -= kept[path].st_size
        path.unlink(missing_ok=True)
    return True
