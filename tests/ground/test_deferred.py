"""Deferred tensors: torch gives for them what it gives for plain ones, and no more is held than allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from pipeline.ground.deferred import cell_of, tensors
from pipeline.ground.unread import Stream, Unread

GRAIN = 2


class Kept:
    """A plain tensor as a file would hold it; counts the rows that are read."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.read = value, 0
        self.unread = Unread(tuple(value.shape), GRAIN, "float32", self.open)

    @contextmanager
    def open(self) -> Iterator[Callable[[int, int], Tensor]]:
        rows = self.value.reshape(-1, self.value.shape[-1] if self.value.dim() else 1)
        rows = rows.view(1, -1) if self.value.dim() < 2 else rows

        def read(start: int, stop: int) -> Tensor:
            assert start % GRAIN == 0
            self.read += stop - start
            return rows[start:stop]

        yield read


def made(stream: Stream, *shapes: tuple[int, ...]) -> tuple[list[Kept], list[Any]]:
    torch.manual_seed(0)
    kept = [Kept(torch.randn(shape).to(torch.bfloat16)) for shape in shapes]
    deferred = tensors(stream, {str(n): one.unread for n, one in enumerate(kept)})
    return kept, list(deferred.values())


def floats(kept: list[Kept]) -> list[Tensor]:
    return [one.value.float() for one in kept]


x = torch.linspace(-1, 1, 24).view(4, 6)
LOADING: dict[str, Callable[[Any, Any], Any]] = {
    "stack": lambda a, b: torch.stack([a, b]),
    "stack, last": lambda a, b: torch.stack([a, b], dim=2),
    "cat": lambda a, b: torch.cat([a, b]),
    "cat of stacks": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "transpose": lambda a, b: a.transpose(0, 1).contiguous(),
    "chunk": lambda a, b: torch.chunk(a, 2, dim=0)[1],
    "split and cat": lambda a, b: torch.cat([*a.split(3, dim=1), b], 1),
    "reshape": lambda a, b: a.reshape(4, 2, 6).transpose(0, 1).reshape(8, 6),
    "sum": lambda a, b: a + 2 * b,
    "index": lambda a, b: a[2:5, None],
    "half": lambda a, b: a.to(torch.float16).float(),
}
RUNNING: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda a, b: linear(x, a, b[:, 0]),
    "matmul": lambda a, b: x @ a.T,
    "embedding": lambda a, b: embedding(torch.tensor([[5, 0, 5], [7, 1, 0]]), a),
    "norm": lambda a, b: torch.linalg.norm(a, dim=1) * b.mean(),
    "operator": lambda a, b: 1 + a * b - a,
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "aten": lambda a, b: torch.ops.aten.mul(a, b),
    "row": lambda a, b: a[3],
    "facts": lambda a, b: [torch.zeros(a.shape), torch.tensor([a.dim(), len(b), a.numel(), a.size(0)])],
}


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return all(same(f, w) for f, w in zip(found, wanted, strict=True))
    return type(found) is Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("name", LOADING)
def test_what_is_done_while_loading_is_done_again_on_the_values(name: str) -> None:
    stream = Stream()
    kept, deferred = made(stream, (8, 6), (8, 6))
    with stream.loading():
        later = LOADING[name](*deferred)
    assert sum(one.read for one in kept) == 0
    wanted = LOADING[name](*floats(kept))
    assert (later.shape, later.dtype) == (wanted.shape, wanted.dtype)
    assert same(later * 1, wanted)
    assert same(later * 1, wanted)  # and again


@pytest.mark.parametrize("name", RUNNING)
def test_an_operation_gives_what_it_gives_for_plain_tensors(name: str) -> None:
    kept, deferred = made(Stream(), (8, 6), (8, 6))
    assert same(RUNNING[name](*deferred), RUNNING[name](*floats(kept)))


def test_embeddings_read_the_rows_of_their_tokens_alone() -> None:
    kept, [table] = made(Stream(), (1000, 6))
    embedding(torch.tensor([1, 500, 500]), table)
    assert kept[0].read == 2 * GRAIN


def test_facts_and_parameters_read_nothing() -> None:
    kept, [weight] = made(Stream(), (8, 6))
    layer = nn.Linear(6, 8, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    twin = copy.deepcopy(layer)
    layer.to("cpu").eval().requires_grad_(False)
    assert isinstance(layer.weight, nn.Parameter)
    assert list(layer.state_dict()) == ["weight"]
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
    assert kept[0].read == 0
    assert same(layer(x), linear(x, kept[0].value.float()))
    twin.load_state_dict({"weight": torch.ones(8, 6)})
    assert kept[0].read == 8
    assert same(twin(x), linear(x, torch.ones(8, 6)))
    assert same(layer(x), linear(x, kept[0].value.float()))


def test_what_is_written_to_stays_and_is_seen_by_all_that_share_it() -> None:
    kept, [weight] = made(Stream(), (8, 6))
    one, other = nn.Parameter(weight), nn.Parameter(weight)
    with torch.no_grad():
        one.mul_(2)
        one.data[0] = 7.0
    wanted = kept[0].value.float() * 2
    wanted[0] = 7.0
    assert same(other + 0, wanted)
    one.data = torch.ones(3, 6)
    assert other.shape == (3, 6)
    assert same(other + 0, torch.ones(3, 6))


def test_no_more_is_held_than_there_is_room_for() -> None:
    size = 8 * 6 * 4
    stream = Stream(room=2 * size)
    kept, deferred = made(stream, *[(8, 6)] * 4)
    for weight in [*deferred, deferred[3], deferred[2]]:
        linear(x, weight)
    assert stream.most == 2 * size
    assert [one.read for one in kept] == [8, 8, 8, 8]  # the last two were held
    linear(x, deferred[0])
    assert kept[0].read == 16
    stream.drop()
    assert not stream.held


def test_one_weight_is_held_where_there_is_no_room() -> None:
    stream = Stream()
    kept, (weight, bias) = made(stream, (8, 6), (8,))
    assert same(linear(x, weight, bias), linear(x, *floats(kept)))
    assert stream.most == 8 * 6 * 4


def test_stacked_parts_are_read_without_another_copy_of_them() -> None:
    stream = Stream()
    _, deferred = made(stream, (8, 6), (8, 6))
    with stream.loading():
        stacked, turned = torch.stack(deferred), deferred[0].T
    found = [cell_of(tensor) for tensor in (stacked, turned)]
    assert [cell.extra_bytes for cell in found if cell] == [0, 8 * 6 * 4]
