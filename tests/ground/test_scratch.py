"""Memory that takes turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from pipeline.ground.scratch import Scratch

CPU = torch.device("cpu")


def test_a_use_keeps_its_memory_and_grows_it() -> None:
    scratch = Scratch()
    large = scratch.empty("one", (8, 16), torch.float32, CPU)
    small = scratch.empty("one", (4, 4), torch.bfloat16, CPU)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (4, 4)
    assert scratch.empty("two", (2,), torch.float32, CPU).data_ptr() != large.data_ptr()
    assert scratch.empty("one", (64, 64), torch.float32, CPU).fill_(1).sum() == 64 * 64


def test_threads_do_not_share() -> None:
    scratch, together = Scratch(), Barrier(2)

    def fill(value: int) -> bool:
        mine = scratch.empty("one", (1000,), torch.float32, CPU).fill_(value)
        together.wait(10)
        return bool((mine == value).all())

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(fill, (1, 2)))
