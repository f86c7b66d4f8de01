"""Outputs that several files of tests look at; made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ground.report import Status
from tests.models import write_llama, write_lora
from tests.running import merge
from tests.stages.quantized import FILES_ONLY, FORMATS, SIZES


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="200KB", **SIZES)
    return base, write_lora(folder / "adapter", base, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="session")
def written(dense: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of each format, verified."""
    folders = {}
    for name in FORMATS:
        folders[name] = tmp_path_factory.mktemp("written") / name
        report = merge(*dense, folders[name], quantize=name, verify="standard", verify_settings=FILES_ONLY)
        assert {gate.name for gate in report.gates if gate.status is not Status.passed} == set()
    return folders
