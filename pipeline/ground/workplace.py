"""Where an output is made: `<output>.partial`, renamed to `output` in one step when it is whole.

Nothing stands at `output` before that, whatever happens; a run that is killed leaves a `.partial`
without config.json and index, and the next run removes it. All but one folder in it: what is done there is
done for good, outlives a run that ends early in any way, and is for the next run with the same output,
which takes what its own request would make and removes the rest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from pipeline.ground.errors import PipelineError, Refused

_MARK = ".unfinished"  # stands in a folder that is ours and not whole; locked while a run writes there


def partial(output: Path) -> Path:
    """The folder in which `output` is made."""
    return output.with_name(output.name + ".partial")


def scratch(output: Path) -> Path:
    """A folder beside what is being made, for what the run needs and the output does not hold."""
    return partial(output) / ".scratch"


def standing(output: Path) -> Path:
    """The folder for what need not be made again if the run ends early; it goes when the output stands."""
    return partial(output) / ".standing"


def rejected(output: Path) -> Path:
    """The folder to which an output goes that verification refused."""
    return output.with_name(output.name + ".rejected")


def check(output: Path) -> None:
    """Refused if a run could not publish at `output`."""
    if output.exists() or output.is_symlink():
        raise Refused(f"output: '{output}' exists already; give another folder, or remove it first")
    parent = _first_existing(output.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Refused(f"output: '{parent}' is not a folder that can be written to; give another output")
    for folder in (partial(output), rejected(output)):
        if folder.exists() and not _is_ours(folder):
            raise Refused(f"output: '{folder}' is in the way and was not made by a run; move it aside")


def free_bytes(output: Path) -> int:
    """Bytes that can still be written where `output` will stand."""
    return shutil.disk_usage(_first_existing(output.absolute().parent)).free


def free_for(output: Path) -> int:
    """The same, with what a killed run left in the partial folder, which a new run removes."""
    left = partial(output).rglob("*") if partial(output).is_dir() else ()
    return free_bytes(output) + sum(path.stat().st_size for path in left if path.is_file())


def _first_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / _MARK).is_file() or (folder / "report.json").is_file() or not any(folder.iterdir())
    )


class Workplace:
    """`with Workplace(output) as place:` makes the partial folder; leaving it unfinished removes it.

    A run that `resumes` finds what stands from an earlier one, and leaves what stands to a later one,
    unless it ends with a Refused.
    """

    def __init__(self, output: Path, resumes: bool = False) -> None:
        self.output = output
        self.folder = partial(output)
        self.resumes = resumes
        self.is_kept = False  # whether it was left unfinished with something for a later run
        self._lock = -1

    def __enter__(self) -> Workplace:
        check(self.output)
        self._made = [p for p in self.output.absolute().parents if not p.exists()]
        self._take()
        try:
            self._clear()  # what a killed run left, now that nobody else is at it
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _clear(self) -> None:
        """Removes all but the mark, and what stands if that is of use."""
        stays = {_MARK, standing(self.output).name} if self.resumes else {_MARK}
        for path in self.folder.iterdir():
            if path.name not in stays:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take(self) -> None:
        """Makes the folder and locks it; Refused if another run holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / _MARK
        lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Refused(f"output: another run is writing '{self.output}'; wait for it") from None
        except OSError:
            pass  # a file system without locks: nothing tells two runs apart there
        if not mark.exists() or mark.stat().st_ino != os.fstat(lock).st_ino:
            os.close(lock)  # whoever held it has just put the folder in its place
            raise Refused(f"output: another run was writing '{self.output}'; start again")
        self._lock = lock

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def publish(self) -> Path:
        """Puts the folder at `output`, complete on disk; PipelineError if something came to stand there."""
        return self._rename(self.output)

    def reject(self) -> Path:
        """Puts the folder aside as `<output>.rejected`, in place of an older one."""
        target = rejected(self.output)
        if target.exists():
            shutil.rmtree(target)
        return self._rename(target)

    def _rename(self, target: Path) -> Path:
        shutil.rmtree(scratch(self.output), ignore_errors=True)
        _settle(self.folder)
        shutil.rmtree(standing(self.output), ignore_errors=True)
        (self.folder / _MARK).unlink()
        _fsync(self.folder)
        if target.exists():
            raise PipelineError(f"output: '{target}' appeared during the run; the result is in {self.folder}")
        self.folder.rename(target)
        _fsync(target.parent)
        self._release()
        return target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ours = self._lock >= 0 and (self.folder / _MARK).exists()
        refused = isinstance(error, Refused) or isinstance(getattr(error, "__cause__", None), Refused)
        if ours and self.resumes and not refused and _holds_something(standing(self.output)):
            self._clear()
            self.is_kept = True
        elif ours:
            shutil.rmtree(self.folder)
            for parent in self._made:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        self._release()


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _settle(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
