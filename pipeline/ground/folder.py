"""The tensors of a checkpoint folder, read with the safetensors library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground.shards import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[int, int], "Tensor"]  # rows(start, stop)


@dataclass
class Folder:
    """The tensors of a written checkpoint, found and read with the safetensors library."""

    path: Path
    shards: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        from safetensors import safe_open

        found: dict[str, str] = {}
        for shard in read_checkpoint(self.path):  # the files that a loader reads, not others beside them
            with safe_open(shard.file.path, "pt") as file:
                found |= dict.fromkeys(file.keys(), shard.file.path.name)
        self.shards = found

    def facts(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor."""
        from safetensors import safe_open

        for shard in sorted(set(self.shards.values())):
            with safe_open(self.path / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    part = file.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())

    @contextmanager
    def opened(self, name: str) -> Iterator[Rows]:
        """rows(start, stop) of a matrix in its stored dtype; of any other tensor, cut into such rows."""
        from safetensors import safe_open

        with safe_open(self.path / self.shards[name], "pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
            if len(shape) < 2:
                whole = file.get_tensor(name).view(1, -1)
                yield lambda start, stop: whole[start:stop]
            else:
                yield partial(_rows, file.get_slice(name), shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop."""
        with self.opened(name) as rows:
            return rows(start, stop)


def _rows(part: Any, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows of all but the last dimension taken as one; of a stack of matrices no more is read than that."""
    import torch

    if len(shape) == 2:
        found: Tensor = part[start:stop]
        return found
    pieces, height = [], max(prod(shape[1:-1]), 1)
    for n in range(start // height, -(-stop // height)):
        low, high = max(start - n * height, 0), min(stop - n * height, height)
        cut = part[n, low:high] if len(shape) == 3 else part[n].reshape(height, shape[-1])[low:high]
        pieces.append(cut)
    return torch.cat(pieces) if pieces else torch.empty(0, shape[-1])
