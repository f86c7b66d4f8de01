"""How a file holds a weight as codes: which tensors those are, and rows of it decoded in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.files import read_tensor
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[int, int], "Tensor"]  # rows(start, stop): (stop - start, columns) float32, on the device


@dataclass(frozen=True)
class Code(ABC):
    """The codes of one weight; `shape` is that of the dense weight they mean.

    Frozen and picklable: entries (paths and offsets), numbers and text, never tensors or open files.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def describe(self) -> str:
        """What people call it, with what matters: bnb nf4, GPTQ 4 bit, FP8 block 128x128."""

    @property
    @abstractmethod
    def entries(self) -> tuple[Entry, ...]:
        """The tensors it uses, each of them wholly."""

    @property
    def grain(self) -> int:
        """Rows that must be decoded together; the dense weight's rows, prod(shape[:-1]) of them."""
        return 1

    @property
    def state_bytes(self) -> int:
        """Memory that `open` holds beside the rows: scales and tables, or the whole where it has no rows."""
        return 0

    @abstractmethod
    def open(self, device: str) -> AbstractContextManager[Rows]:
        """Rows decoded on `device`: codes travel packed. Every multiplication is in float32, none rounds.

        After one rounding to the dtype that the reference decoder gives, the values are its very bits.
        Safe to call from several threads. `rows` starts at multiples of `grain`.
        """


@dataclass(frozen=True, slots=True)
class Found:
    """A weight that a finder made out: its dense name, its codes, and the tensor whose place it takes."""

    name: str
    code: Code
    main: Entry


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint says of its quantization beside its tensors."""

    config: Mapping[str, Any]  # quantization_config (from whatever depth), {} if there is none
    beside: Mapping[str, Any] = field(default_factory=dict)  # quantize_config.json or hf_quant_config.json
    metadata: Mapping[str, str] = field(default_factory=dict)  # of all shards' headers together
    dtype: str = "BF16"  # of the model, as its config says it


Finder = Callable[[Mapping[str, Entry], Quantization], Iterable[Found]]
"""Gives what it makes out by names, dtypes and shapes; Refused for what is surely its format but corrupt.

`tensors` are all that no earlier finder has used. A finder takes nothing that it is not sure of.
"""


def read_whole(entry: Entry, device: str = "cpu") -> Tensor:
    """A tensor of a part (scales, tables, packed shapes) with its file's values and shape."""
    with entry.extent.file.opened() as descriptor:
        raw = read_tensor(descriptor, entry.extent.offset, entry.extent.length, device)
    return raw.view(torch_dtype(entry.dtype)).view(entry.shape)
