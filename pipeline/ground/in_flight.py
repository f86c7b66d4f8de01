"""How many tiles are on a device at a time: as many as there are workers, fewer where its memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

from pipeline.ground.errors import PipelineError

T = TypeVar("T")


class InFlight:
    """Tiles at work on a device. The tiles themselves stay as they are: their sums would change with them.

    All are queued on the device's one default stream, so that what a weight holds there (factors, tables,
    packed codes) needs no further care; what overlaps is reading, copying, hashing and writing on the host.
    """

    def __init__(self, device: str, most: int) -> None:
        self.device, self.limit = device, most
        self._running, self._changed = 0, Condition()

    def run(self, work: Callable[[], T]) -> T:
        """`work()`; where the device is short of memory for it, once more when fewer others are at it."""
        import torch

        while True:
            try:
                with self._one_more() as at_once:
                    return work()
            except torch.OutOfMemoryError as error:
                if at_once == 1:
                    raise self.too_small() from error
                self._allow(at_once - 1)
            torch.cuda.empty_cache()

    def too_small(self) -> PipelineError:
        """The sentence for a device that does not even hold one tile."""
        return PipelineError(
            f"device: {self.device} has not the memory for one tile and what its weight holds; free some of "
            "it, or give device=cpu"
        )

    @contextmanager
    def _one_more(self) -> Iterator[int]:
        """A place among those at work, when there is one; gives how many there are then."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < self.limit)
            self._running += 1
            at_once = self._running
        try:
            yield at_once
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _allow(self, most: int) -> None:
        with self._changed:
            self.limit = max(min(self.limit, most), 1)
