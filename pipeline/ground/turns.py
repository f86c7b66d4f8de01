"""Several computations that take turns: each goes on to its next pause, then the others do, then all again.

So many forward passes can go through a model together, layer by layer, each with its own state and none
written anew: a pass is a thread, of which only one runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


class _GivenUp(BaseException):
    """Raised at its pause in a pass that nobody waits for any more."""


@dataclass
class _Pass(Generic[T]):
    work: Callable[[], T]
    before: Callable[[], object]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    results: list[T] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False


class Turns:
    """`run` makes the passes; `pause`, called in one of them, lets the others come this far."""

    def __init__(self) -> None:
        self._back = threading.Semaphore(0)
        self._passes: dict[int, _Pass[object]] = {}  # by thread
        self._given_up = False

    def run(
        self, passes: Sequence[tuple[Callable[[], object], Callable[[], T]]], between: Callable[[], object]
    ) -> list[T]:
        """What the passes give: each is (before every turn of it, the work); `between` after each round."""
        all_passes = [_Pass(work, before) for before, work in passes]
        threads = [threading.Thread(target=self._run, args=(p,), daemon=True) for p in all_passes]
        self._given_up = False
        for thread in threads:
            thread.start()
        try:
            while left := [p for p in all_passes if not p.done]:
                for one in left:
                    one.before()
                    one.go.release()
                    self._back.acquire()
                    if one.error is not None:
                        raise one.error
                between()
        finally:
            self._given_up = True
            for one in all_passes:
                one.go.release()
            for thread in threads:
                thread.join()
        return [one.results[0] for one in all_passes]

    def pause(self) -> None:
        """Waits for the next turn; does nothing in a thread that is no pass."""
        one = self._passes.get(threading.get_ident())
        if one is None:
            return
        if not self._given_up:
            self._back.release()
            one.go.acquire()
        if self._given_up:
            raise _GivenUp

    def _run(self, one: _Pass[T]) -> None:
        one.go.acquire()
        self._passes[threading.get_ident()] = one  # type: ignore[assignment]
        try:
            if not self._given_up:
                one.results.append(one.work())
        except _GivenUp:
            pass
        except BaseException as error:  # whatever it is, who runs the passes raises it
            one.error = error
        finally:
            del self._passes[threading.get_ident()]
            one.done = True
            self._back.release()
