"""A bar of bytes with speed and time to go, on stderr; a line now and then where that is no terminal."""

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

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0

    def __enter__(self) -> Progress:
        self.begun = self.told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TextColumn("eta"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
        return self

    def advance(self, num_bytes: int) -> None:
        """Counts bytes as done."""
        self.done += num_bytes
        if self._bar:
            self._bar.advance(self._task, num_bytes)
            return
        now = time.monotonic()
        if now - self.told >= _SECONDS_BETWEEN_LINES and self.done:
            self.told = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            line = (
                f"{self.title}: {show_bytes(self.done)} of {show_bytes(self.total)}, eta {show_seconds(left)}"
            )
            sys.stderr.write(line + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def say(text: str) -> None:
    """A line between the others on stderr."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what goes on while nothing can be counted; on something that is no terminal, nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
