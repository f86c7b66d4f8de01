"""Each thread's tiles on a stream of their own: begun after what their weight holds, done when handed on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch

from pipeline.ground.in_flight import InFlight
from pipeline.ground.streams import Streams, kept, used
from tests.ground.fake_cuda import FakeCuda, FakeStream, cuda

__all__ = ["cuda"]


def test_a_tile_finds_what_its_weight_has_queued_and_is_done_when_handed_on(cuda: FakeCuda) -> None:
    in_flight = InFlight("cuda", 4)

    def tile(number: int, weight: list[int]) -> list[int]:
        result: list[int] = []
        cuda.current().queue(lambda: result.append(weight[0] * number))
        return result

    with ThreadPoolExecutor(4) as pool:
        tiles = []
        for factor in (3, 5, 7):  # a weight after the other is opened, while tiles are at work
            weight: list[int] = []
            cuda.opening.queue(partial(weight.append, factor))
            tiles += [pool.submit(in_flight.run, partial(tile, n, weight)) for n in range(50)]
        results = [t.result() for t in tiles]
    assert results == [[factor * n] for factor in (3, 5, 7) for n in range(50)]


def test_no_stream_has_two_tiles_at_a_time_and_none_is_that_of_opening(cuda: FakeCuda) -> None:
    in_flight, together = InFlight("cuda:0", 4), Barrier(4)

    def tile(number: int) -> FakeStream:
        together.wait()
        return cuda.current()

    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda n: in_flight.run(partial(tile, n)), range(80)))
    assert len(set(streams)) == len(cuda.made) == 4
    assert cuda.opening not in streams
    assert [s.most_at_work for s in cuda.made] == [1] * 4
    assert cuda.current() is cuda.opening


def test_what_a_tile_queued_before_memory_ran_out_is_done_before_it_is_tried_again(cuda: FakeCuda) -> None:
    in_flight = InFlight("cuda", 2)
    in_flight._running = 1  # another one, which takes the memory
    seen: list[list[str]] = []
    log: list[str] = []

    def tile() -> int:
        seen.append(list(log))
        cuda.current().queue(lambda: log.append("queued"))
        if len(seen) == 1:
            in_flight._running -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(seen)

    assert in_flight.run(tile) == 2
    assert seen == [[], ["queued"]]
    assert log == ["queued"] * 2
    assert (len(cuda.made), in_flight.limit) == (1, 1)


def test_an_error_is_told_when_nothing_is_queued_any_more(cuda: FakeCuda) -> None:
    log: list[str] = []

    def tile() -> None:
        cuda.current().queue(lambda: log.append("queued"))
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        InFlight("cuda", 2).run(tile)
    assert log == ["queued"]


def test_what_streams_hold_is_given_back_at_the_end(cuda: FakeCuda) -> None:
    in_flight = InFlight("cuda", 2)
    assert in_flight.run(lambda: 3) == 3
    assert not cuda.cleared
    in_flight.give_back()
    assert cuda.cleared == 1


def test_on_a_cpu_there_is_no_stream(cuda: FakeCuda) -> None:
    streams = Streams("cpu")
    with streams.own():
        assert cuda.current() is cuda.opening
    streams.give_back()
    assert not cuda.made
    assert not cuda.cleared


class OnGpu:
    """A tensor as far as streams see it."""

    is_cuda, device = True, "cuda:0"

    def __init__(self) -> None:
        self.recorded: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.recorded.append(stream)


def test_what_one_tile_makes_for_others_stands_and_stays(cuda: FakeCuda) -> None:
    own, other, log = FakeStream(), FakeStream(), list[str]()
    tensor: Any = OnGpu()
    with cuda.on(own):
        own.queue(lambda: log.append("made"))
        assert kept(tensor) is tensor
        assert log == ["made"]
    with cuda.on(other):
        assert used(tensor) is tensor
    assert tensor.recorded == [other]
    plain = torch.ones(2)
    assert kept(plain) is used(plain) is plain
