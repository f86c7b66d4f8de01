"""A device that is short of memory gets fewer tiles at a time, not other ones."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Lock

import pytest
import torch

from pipeline.ground.errors import PipelineError
from pipeline.ground.in_flight import InFlight
from tests.ground.fake_cuda import FakeCuda, cuda

__all__ = ["cuda"]
pytestmark = pytest.mark.usefixtures("cuda")


class Room:
    """Stands for a device's memory: work that begins where `places` others are at it finds none left."""

    def __init__(self, places: int) -> None:
        self.places, self.taken, self.refused = places, 0, 0
        self._lock = Lock()

    def work(self, number: int) -> int:
        with self._lock:
            if self.taken >= self.places:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.taken += 1
        time.sleep(0.002)
        with self._lock:
            self.taken -= 1
        return number * number


@pytest.mark.parametrize("places", [1, 2, 3, 8])
def test_all_is_done_with_as_many_at_a_time_as_there_is_room_for(places: int) -> None:
    room, in_flight = Room(places), InFlight("cuda", 8)
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(in_flight.run, partial(room.work, n)) for n in range(100)]
        assert [r.result() for r in results] == [n * n for n in range(100)]
    assert in_flight.limit <= 8
    assert (room.refused > 0) == (places < 8)
    assert in_flight.limit <= places or places == 8
    refused = room.refused
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: in_flight.run(partial(room.work, n)), range(100))) == 328350
    assert room.refused == refused  # learnt once


def test_a_device_without_room_for_one_says_so() -> None:
    in_flight = InFlight("cuda:1", 4)
    with pytest.raises(PipelineError, match=r"^device: cuda:1 has not the memory for one tile.*device=cpu$"):
        in_flight.run(partial(Room(0).work, 1))
    assert in_flight.run(lambda: 3) == 3


def test_a_tile_that_began_alone_and_was_joined_is_not_taken_for_too_large() -> None:
    in_flight, begun, joined, ended = InFlight("cuda", 2), Event(), Event(), Event()

    def first() -> int:
        begun.set()
        assert joined.wait(10)
        if not ended.is_set():
            ended.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    def second() -> int:
        joined.set()
        assert ended.wait(10)
        return 2

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(in_flight.run, first)
        assert begun.wait(10)
        assert pool.submit(in_flight.run, second).result() == 2
        assert one.result() == 1
    assert in_flight.limit == 1


def test_alone_a_tile_gets_what_other_threads_streams_have_kept(cuda: FakeCuda) -> None:
    in_flight = InFlight("cuda", 1)

    def tile() -> int:
        if not cuda.cleared:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5

    assert in_flight.run(tile) == 5


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"):
        InFlight("cuda", 2).run(partial(_fail))


def _fail() -> None:
    raise ValueError("mine")
