"""Work in parallel, results in order: what keeps writing, hashing and computing busy at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_order(tasks: Iterable[Callable[[], T]], workers: int, window: int) -> Iterator[Iterator[T]]:
    """Runs the tasks on `workers` threads; gives their results in the order of the tasks.

    At most `window` tasks are begun and not yet handed on, which bounds the memory of their results. A
    task that raises ends it; leaving the `with` drops what has not begun and waits for what has.
    """
    begun: deque[Future[T]] = deque()

    def results() -> Iterator[T]:
        for task in tasks:
            if len(begun) >= window:
                yield begun.popleft().result()
            begun.append(pool.submit(task))
        while begun:
            yield begun.popleft().result()

    with ThreadPoolExecutor(workers, thread_name_prefix="tile") as pool:
        try:
            yield results()
        finally:
            for future in begun:
                future.cancel()


def keep_freed_memory() -> None:
    """Lets the process keep what tiles free, for the next tiles, instead of giving pages back each time.

    Faulting them in again costs as much as the arithmetic. For glibc's malloc (mallopt(3)); elsewhere
    nothing is done.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        mallopt(trim_threshold, 256 << 20)
        mallopt(top_pad, 16 << 20)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Each tile on one thread, so that sums do not depend on how many there are; float32, never TF32."""
    import torch

    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32
