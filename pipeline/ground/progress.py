"""A bar of bytes or layers with the time to go, on stderr; a line now and then where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from pipeline.ground.units import show_bytes, show_seconds

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """`with Progress("merging", total) as bar:` and `bar.advance(num_bytes)` as the work goes on."""

    def __init__(self, title: str, total: int, unit: str = "") -> None:
        self.title, self.total, self.done, self.unit = title, total, 0, unit  # bytes, if there is no unit

    def __enter__(self) -> Progress:
        self.begun = self.told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
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
        if now - self.told >= _SECONDS_BETWEEN_LINES and self.done:
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


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what goes on while nothing can be counted; on something that is no terminal, nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
