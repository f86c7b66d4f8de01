"""What flows through a run: stored weights, the dense weights they mean, an adapter, an output.

Everything here is lazy and picklable - paths and offsets, never open files or tensors - so a list of
weights is a plan. Tensors exist only inside `with weight.open(device) as tiles`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pipeline.ground.codes.code import Code
from pipeline.ground.combining import Combination
from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.kind import NOTHING_TOLD, Told
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.files import File, read_tensor
from pipeline.ground.hub import Source
from pipeline.ground.metrics import Statistics
from pipeline.ground.model_config import ConfigSource
from pipeline.ground.report import Finding, Plan
from pipeline.ground.shards import Entry, Shard
from pipeline.ground.sidefiles import SideFile
from pipeline.ground.tiles import as_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.extraction.result import Extraction


class Tile(NamedTuple):
    """A block of rows `(rows, columns)`: the value still to be rounded, and what it is made of.

    `base` is the weight before the merge; `delta` what was added, None for a weight no delta reaches.
    """

    value: Tensor
    base: Tensor
    delta: Tensor | None = None


Tiles = Callable[[int, int], Tile]  # tiles(start, stop) gives the rows start:stop


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as its files hold it: one tensor of plain numbers, or codes.

    `shape` and `dtype` are those of the dense weight it means.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    held: Entry | Code


@dataclass(frozen=True)
class Weight(ABC):
    """A dense weight, by row tiles. Rows run over prod(shape[:-1]); 0-d and 1-d weights are one row."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_rows(self) -> int:
        return as_matrix(self.shape)[0]

    @property
    def num_columns(self) -> int:
        return as_matrix(self.shape)[1]

    @property
    def grain(self) -> int:
        """Rows that must stay together: every tile starts at a multiple of it."""
        return 1

    @property
    def stored_as(self) -> str:
        """What the base's file holds: a safetensors dtype, a GGUF type, or the name of a code."""
        return self.dtype

    @property
    def state_bytes(self) -> int:
        """Memory that `open` holds while tiles are computed, beside the tiles."""
        return 0

    @property
    def source(self) -> Entry | None:
        """Where these very bytes lie in a file, as long as nothing has changed the weight."""
        return None

    @abstractmethod
    def open(self, device: str) -> AbstractContextManager[Tiles]:
        """Tiles computed on `device`; safe to call from several threads."""


@dataclass(frozen=True)
class Dense(Weight):
    """A weight whose file holds it as plain numbers."""

    entry: Entry

    @property
    def source(self) -> Entry:
        return self.entry

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        kind, extent = torch_dtype(self.dtype), self.entry.extent
        row = extent.length // max(self.num_rows, 1)
        with extent.file.opened() as descriptor:

            def tile(start: int, stop: int) -> Tile:
                raw = read_tensor(descriptor, extent.offset + start * row, (stop - start) * row, device)
                value = raw.view(kind).view(stop - start, self.num_columns)
                return Tile(value, value)

            yield tile


@dataclass(frozen=True)
class Decoded(Weight):
    """A weight that its files hold as codes, decoded in float32."""

    code: Code

    @property
    def stored_as(self) -> str:
        return self.code.describe

    @property
    def grain(self) -> int:
        return self.code.grain

    @property
    def state_bytes(self) -> int:
        return self.code.state_bytes

    @contextmanager
    def open(self, device: str) -> Iterator[Tiles]:
        with self.code.open(device) as rows:

            def tile(start: int, stop: int) -> Tile:
                value = rows(start, stop).view(stop - start, self.num_columns)
                return Tile(value, value)

            yield tile


class Tied(Enum):
    """What to do when an adapter changes embeddings that lm_head shares."""

    auto = "auto"
    untie = "untie"
    shared = "shared"
    refuse = "refuse"


W = TypeVar("W", bound=Weight | Stored, covariant=True)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A file of the checkpoint and its weights in order; `original` is the base's file, if it is one."""

    name: str
    weights: tuple[str, ...]
    original: Shard | None = None


@dataclass(frozen=True)
class Merging:
    """What a merge was asked to do with the adapters."""

    factor: float = 1.0
    normalize: bool = False  # the adapters' weights divided by their sum
    renames: Mapping[str, str] = field(default_factory=dict)
    tied: Tied = Tied.auto
    combination: Combination | None = None  # how deltas become one, if not by their sum


@dataclass(frozen=True)
class Checkpoint(Generic[W]):
    """Weights in file order, the layout of their files, and everything that travels beside them."""

    weights: tuple[W, ...]
    shards: tuple[ShardLayout, ...]
    dtype: str  # the main one: what `save.dtype=keep` means for weights that have no dtype of their own
    config: ConfigSource
    origin: Source
    files: tuple[File, ...]  # the weight files it was read from
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    findings: tuple[Finding, ...] = ()
    left_open: bool = False  # the request does not say which base is meant, this or a quantized one
    merging: Merging | None = None  # if an adapter was merged into it


@dataclass(frozen=True)
class Part:
    """One adapter as its folder holds it: deltas with its own module names, bound to no base yet."""

    deltas: tuple[Delta, ...]
    config: Mapping[str, Any]
    origin: Source
    files: tuple[File, ...]
    weight: float = 1.0  # its share among several
    side_files: tuple[SideFile, ...] = ()
    findings: tuple[Finding, ...] = ()
    extraction: Extraction | None = None  # what it was made of, if this run makes it
    told: Told = NOTHING_TOLD
    initial: Path | None = None  # its folder as it was before training, which is taken off


@dataclass(frozen=True)
class Adapter:
    """What is merged: one adapter, or several with a weight each."""

    parts: tuple[Part, ...]

    @property
    def deltas(self) -> tuple[Delta, ...]:
        return tuple(delta for part in self.parts for delta in part.deltas)

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(file for part in self.parts for file in part.files)

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for part in self.parts for finding in part.findings)


@dataclass(frozen=True)
class Output:
    """What save wrote (or found): the folder, how its weights came about, and what it measured."""

    folder: Path
    plan: Plan
    merged: Checkpoint[Weight]
    adapter: Adapter
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool = False  # the folder holds the adapter, not the merged model

    def statistics_as_dicts(self) -> dict[str, dict[str, Any]]:
        """For the report."""
        shifts = {w.name: {"base_shift": w.base_shift} for w in self.plan.weights if w.base_shift is not None}
        return {name: found.as_dict() | shifts.get(name, {}) for name, found in self.statistics.items()}
