"""A CUDA device's streams on the CPU: what is queued is done when something waits for it, no sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, local

import pytest
import torch


class FakeStream:
    """A queue of calls; `at_work` counts who has it as the current one."""

    def __init__(self, device: object = "cuda:0") -> None:
        self.device, self.at_work, self.most_at_work = device, 0, 0
        self._queue: list[Callable[[], None]] = []
        self._done, self._lock = 0, RLock()

    def queue(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._queue.append(call)

    def wait_stream(self, other: FakeStream) -> None:
        end = len(other._queue)
        self.queue(lambda: other._run(end))

    def synchronize(self) -> None:
        self._run(len(self._queue))

    def _run(self, end: int) -> None:
        with self._lock:
            while self._done < end:
                self._queue[self._done]()
                self._done += 1


class FakeCuda:
    """Stands for `torch.cuda`: the streams made so far, and the one on which weights are opened."""

    def __init__(self) -> None:
        self.opening, self.made, self.cleared = FakeStream(), list[FakeStream](), 0
        self._current = local()

    def current(self, device: object = None) -> FakeStream:
        stream: FakeStream = getattr(self._current, "stream", self.opening)
        return stream

    def create(self, device: object = None) -> FakeStream:
        self.made.append(FakeStream(device))
        return self.made[-1]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before = self.current()
        self._current.stream = stream
        stream.at_work += 1
        stream.most_at_work = max(stream.most_at_work, stream.at_work)
        try:
            yield
        finally:
            stream.at_work -= 1
            self._current.stream = before

    def clear(self) -> None:
        self.cleared += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """`torch.cuda` with streams of the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current)
    monkeypatch.setattr(torch.cuda, "Stream", fake.create)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", fake.clear, raising=False)
    return fake
