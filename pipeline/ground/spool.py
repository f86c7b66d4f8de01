"""Tensors put aside in one file as they are made, to be read again by leading rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.ground.files import read_tensor, write_all

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a float32 matrix lies."""

    offset: int
    rows: int
    columns: int


class Spool:
    """`with Spool(path) as spool:`; the file is gone afterwards."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0

    def __enter__(self) -> Spool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def keep(self, matrix: Tensor) -> Kept:
        """Appends a float32 matrix."""
        import torch

        kept = Kept(self._end, matrix.shape[0], matrix.shape[1])
        buffer = memoryview(matrix.contiguous().view(-1).view(torch.uint8).numpy())
        write_all(self._descriptor, self._end, buffer)
        self._end += len(buffer)
        return kept

    def first(self, kept: Kept, rows: int) -> Tensor:
        """Its leading rows; rows of zeros below them where it has fewer."""
        import torch

        held = min(rows, kept.rows)
        raw = read_tensor(self._descriptor, kept.offset, held * kept.columns * 4)
        values = raw.view(torch.float32).view(held, kept.columns)
        return torch.cat((values, values.new_zeros(rows - held, kept.columns))) if held < rows else values
