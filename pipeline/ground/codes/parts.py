"""The tensors that hold one weight: a module's, by their last names, and bytes of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.ground.files import read_into, read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, Entry]  # of one module, by their last names: qweight, scales, bias


def by_module(tensors: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The tensors of each module by their last names, in the order of the modules' first tensors."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = entry
    return modules


def weight_of(module: str) -> str:
    """The name of a module's dense weight."""
    return f"{module}.weight" if module else "weight"


def read_bytes(entry: Entry) -> bytes:
    """A small tensor's bytes, without torch."""
    buffer = bytearray(entry.extent.length)
    with entry.extent.file.opened() as descriptor:
        read_into(descriptor, entry.extent.offset, memoryview(buffer))
    return bytes(buffer)


def read_numbers(entry: Entry) -> list[int]:
    """A small tensor of integers (U8, I8, I32, I64), flat."""
    code = {"U8": "B", "I8": "b", "I32": "i", "I64": "q"}[entry.dtype]
    return array(code, read_bytes(entry)).tolist()


def mentioned(settings: Mapping[str, Any], key: str) -> list[int]:
    """The whole numbers that a quantization config gives for `key`, for all modules or for some of them."""
    tables = [settings, *(t for of in ("dynamic", "extra_config") for t in (settings.get(of) or {}).values())]
    numbers = {table.get(key) for table in tables if isinstance(table, Mapping)}
    return sorted(n for n in numbers if isinstance(n, int) and not isinstance(n, bool))


@contextmanager
def rows_of(entry: Entry, num_rows: int, device: str) -> Iterator[Callable[[int, int], Tensor]]:
    """rows(start, stop): those rows of a tensor that has `num_rows` of them, `(rows, bytes)` uint8."""
    width = entry.extent.length // max(num_rows, 1)
    with entry.extent.file.opened() as descriptor:

        def rows(start: int, stop: int) -> Tensor:
            raw = read_tensor(descriptor, entry.extent.offset + start * width, (stop - start) * width)
            return raw.view(stop - start, width).to(device)

        yield rows
