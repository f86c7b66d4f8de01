"""A bar of bytes or layers with the time to go, on stderr; a line now and then where that is no terminal.

In a notebook rich draws the bar under the cell, where ipywidgets is there to draw it with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import TracebackType

from pipeline.ground.units import show_bytes, show_seconds

_SECONDS_BETWEEN_LINES = 15.0
_QUIET = ContextVar("quiet", default=False)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Within it nothing is shown: no progress, and no plan or report."""
    token = _QUIET.set(quiet or is_quiet())
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether nothing is to be shown here."""
    return _QUIET.get()


def _draws() -> bool:
    """Whether something that moves can be drawn: on a terminal, or in a notebook."""
    if is_quiet():
        return False
    if "ipykernel" not in sys.modules or find_spec("ipywidgets") is None:
        return sys.stderr.isatty()
    from rich.console import Console

    return Console().is_jupyter


class Progress:
    """`with Progress("merging", total) as bar:` and `bar.advance(num_bytes)` as the work goes on."""

    def __init__(self, title: str, total: int, unit: str = "") -> None:
        self.title, self.total, self.done, self.quiet = title, total, 0, is_quiet()
        self.unit = unit  # bytes, if there is none

    def __enter__(self) -> Progress:
        self.begun = self.told = time.monotonic()
        self._bar = None
        if _draws():
            from rich import progress
            from rich.console import Console

            counted: tuple[progress.ProgressColumn, ...]
            if self.unit:
                counted = (progress.MofNCompleteColumn(), progress.TextColumn(self.unit))
            else:
                counted = (progress.DownloadColumn(), progress.TransferSpeedColumn())
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                *counted,
                progress.TextColumn("eta"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
        return self

    def advance(self, num_bytes: int) -> None:
        """Counts bytes, or units, as done."""
        self.done += num_bytes
        if self._bar:
            self._bar.advance(self._task, num_bytes)
            return
        now = time.monotonic()
        if not self.quiet and now - self.told >= _SECONDS_BETWEEN_LINES and self.done:
            self.told = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            sys.stderr.write(f"{self.title}: {self._shown()}, eta {show_seconds(left)}\n")

    def _shown(self) -> str:
        if self.unit:
            return f"{self.done} of {self.total} {self.unit}"
        return f"{show_bytes(self.done)} of {show_bytes(self.total)}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def say(text: str) -> None:
    """A line between the others on stderr."""
    if not is_quiet():
        sys.stderr.write(f"{text}\n")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what goes on while nothing can be counted; on something that is no terminal, nothing."""
    if not _draws():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
