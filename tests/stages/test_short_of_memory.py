"""A merge on a device that is short of memory: slower, with the same bytes, or one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from pipeline.ground import tiles as cutting
from pipeline.ground.errors import PipelineError
from pipeline.output import stream
from pipeline.output.storing import Storing
from tests.models import write_llama, write_lora
from tests.running import merge


class Device:
    """Memory for `tiles` tiles at work and `weights` open weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tiles: int = 99, weights: int = 99) -> None:
        self.tiles, self.weights = tiles, weights
        self.at_work = self.open = self.refused = 0
        self._lock, self._tile, self._storing = Lock(), Storing.tile, stream.storing
        device = self

        def tile(stored: Storing, *rows: Any) -> Any:
            with device.taking("at_work", device.tiles):
                return device._tile(stored, *rows)

        @contextmanager
        def storing(*arguments: Any) -> Iterator[Storing]:
            with device.taking("open", device.weights), device._storing(*arguments) as stored:
                yield stored

        monkeypatch.setattr(Storing, "tile", tile)
        monkeypatch.setattr(stream, "storing", storing)
        monkeypatch.setattr(stream, "num_workers", lambda: 4)
        monkeypatch.setattr(cutting, "TILE_ELEMENTS", 256)

    @contextmanager
    def taking(self, what: str, most: int) -> Iterator[None]:
        with self._lock:
            if getattr(self, what) >= most:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            setattr(self, what, getattr(self, what) + 1)
        try:
            yield
        finally:
            with self._lock:
                setattr(self, what, getattr(self, what) - 1)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("room", [{"tiles": 1}, {"weights": 1}, {"tiles": 2, "weights": 2}])
def test_what_is_short_of_memory_gives_the_same_bytes(
    room: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    with monkeypatch.context() as patched:
        plenty = Device(patched)
        merge(base, adapter, tmp_path / "out")
        assert not plenty.refused
    device = Device(monkeypatch, **room)
    merge(base, adapter, tmp_path / "other")
    assert device.refused
    assert device.at_work == device.open == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "other")


@pytest.mark.parametrize("room", [{"tiles": 0}, {"weights": 0}])
def test_no_memory_at_all_is_one_sentence_and_leaves_nothing(
    room: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    Device(monkeypatch, **room)
    with pytest.raises(PipelineError, match=r"has not the memory for one tile and what its weight holds"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
