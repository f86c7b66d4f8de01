"""How many tiles are on a device at a time: as many as there are workers, fewer where its memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock
from typing import TypeVar

from pipeline.ground.errors import PipelineError
from pipeline.ground.streams import Streams

T = TypeVar("T")


class InFlight:
    """Tiles at work on a device. The tiles themselves stay as they are: their sums would change with them.

    On a GPU each is on the stream of its thread (`streams.py`): as many overlap as there are threads.
    Made by the thread that opens weights.
    """

    def __init__(self, device: str, most: int) -> None:
        self.device, self.limit = device, most
        self.opening = Lock()  # held while a weight is opened
        self._running, self._changed = 0, Condition()
        self._streams = Streams(device)

    def run(self, work: Callable[[], T]) -> T:
        """`work()`, done on the device too; where that is short of memory, again when fewer are at it."""
        import torch

        while True:
            with self._one_more() as (at_once, alone):
                try:
                    with self._streams.own():
                        return work()
                except torch.OutOfMemoryError:
                    pass  # and with the error goes what it held of the tile
                if alone:
                    return self._with_all(work)
            self._allow(at_once - 1)
            torch.cuda.empty_cache()

    def _with_all(self, work: Callable[[], T]) -> T:
        """`work()` in all the memory that open weights leave; no other tile is at work."""
        import torch

        with self.opening:
            self.give_back()
        try:
            with self._streams.own():
                return work()
        except torch.OutOfMemoryError as error:
            raise self.too_small() from error

    def give_back(self) -> None:
        """Frees what streams keep for further tiles, while no tile is at work and no weight being opened."""
        self._streams.give_back()

    def too_small(self) -> PipelineError:
        """The sentence for a device that does not even hold one tile."""
        return PipelineError(
            f"device: {self.device} has not the memory for one tile and what its weight holds; free some of "
            "it, or give device=cpu"
        )

    @contextmanager
    def _one_more(self) -> Iterator[tuple[int, bool]]:
        """A place among those at work, when there is one: how many there are then, if no more can come."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < self.limit)
            self._running += 1
            found = self._running, self.limit == 1
        try:
            yield found
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _allow(self, most: int) -> None:
        with self._changed:
            self.limit = max(min(self.limit, most), 1)
