"""Passes that take turns: in order, each with its own state, and none left waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipeline.ground.turns import Turns


def test_each_goes_to_its_next_pause_before_any_goes_on() -> None:
    turns, seen = Turns(), []

    def work(name: str, pauses: int) -> Callable[[], str]:
        def run() -> str:
            for step in range(pauses + 1):
                seen.append(f"{name}{step}")
                if step < pauses:
                    turns.pause()
            return name

        return run

    rounds: list[int] = []
    passes = [(lambda: None, work("a", 2)), (lambda: None, work("b", 2)), (lambda: None, work("c", 0))]
    assert turns.run(passes, lambda: rounds.append(len(seen))) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b1", "a2", "b2"]
    assert rounds == [3, 5, 7]


def test_before_every_turn_its_own_state_is_set() -> None:
    turns, state, seen = Turns(), ["none"], []

    def set_to(value: str) -> Callable[[], None]:
        return lambda: state.__setitem__(0, value)

    def look() -> None:
        for _ in range(3):
            seen.append(state[0])
            turns.pause()

    turns.run([(set_to("on"), look), (set_to("off"), look)], lambda: None)
    assert seen == ["on", "off"] * 3


def test_one_that_fails_ends_all_and_says_why() -> None:
    turns, before = Turns(), threading.active_count()
    ended: list[str] = []

    def waits() -> None:
        try:
            turns.pause()
            turns.pause()
        finally:
            ended.append("waits")

    def fails() -> None:
        turns.pause()
        raise ValueError("as it should")

    with pytest.raises(ValueError, match="as it should"):
        turns.run([(lambda: None, waits), (lambda: None, fails), (lambda: None, waits)], lambda: None)
    assert ended == ["waits", "waits"]
    assert threading.active_count() == before
    assert turns.run([(lambda: None, lambda: 1)], lambda: None) == [1]


def test_a_pause_outside_is_none() -> None:
    Turns().pause()
