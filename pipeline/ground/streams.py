"""CUDA streams: each thread that computes tiles has one, so that their copies and kernels overlap.

A tile is copied to the device, decoded, merged, rounded and copied back on the stream of its thread, in this
order; other threads' tiles are on others, and a GPU copies both ways while it computes. Nothing is shared
without an order:

- What a weight holds on the device (factors, scales, tables, packed codes) is made on the stream on which
  weights are opened. A tile's stream first waits for all that is queued there.
- A tile is handed on, or fails, when its stream has run empty. So when a weight is closed, which is once all
  its tiles are handed on, nothing reads it any more, and its memory may serve the next one.
- Memory that a tile takes is its stream's own; torch's allocator hands it out again on that stream alone.
- Pinned buffers are handed out again when their copy is done: torch records an event where it queues one.
- Tables kept for a process (`lru_cache`) come from memory that is not pinned: torch waits for such copies.
  What else one tile makes and others use goes through `kept` and `used`.

A thread keeps its stream, for cuBLAS has a workspace for each pair of a thread's handle and a stream: so
there are as many as threads, and what one product gives does not depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Streams:
    """A stream for each thread at work on a CUDA device; on other devices there is nothing to do.

    Made by the thread that opens weights, on the stream that is current there, as a rule the default one.
    """

    def __init__(self, device: str) -> None:
        self._opening = _current(device) if device.startswith("cuda") else None
        self._own = local()

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is queued inside is on the thread's own stream, after all that was queued on the opening one.

        At the end, also by an error, all of it is done.
        """
        import torch

        if self._opening is None:
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(device=self._opening.device)
        stream = self._own.stream
        stream.wait_stream(self._opening)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def give_back(self) -> None:
        """Frees the workspaces and caches of all streams, while nothing is being queued on any."""
        import torch

        if self._opening is not None:
            torch._C._cuda_clearCublasWorkspaces()  # the way that torch's notes on CUDA give
            torch.cuda.empty_cache()


def kept(tensor: Tensor) -> Tensor:
    """What one tile has made for others too, when it stands there, whatever stream they are on."""
    if tensor.is_cuda:
        _current(tensor.device).synchronize()
    return tensor


def used(tensor: Tensor) -> Tensor:
    """What another tile may have made: its memory is not handed out before what is queued here is done."""
    if tensor.is_cuda:
        tensor.record_stream(_current(tensor.device))
    return tensor


def _current(device: str | torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.current_stream(device)
