"""Hashes made ahead of their use."""

from __future__ import annotations

import hashlib
from concurrent.futures import wait
from pathlib import Path

import pytest

from pipeline.ground import digests
from pipeline.ground.digests import Digests, ahead
from pipeline.ground.errors import PipelineError
from pipeline.ground.files import File


def _file(folder: Path, content: bytes) -> File:
    (folder / "weights").write_bytes(content)
    return File.at(folder / "weights")


def test_what_was_hashed_ahead_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 9000
    file, read = _file(tmp_path, content), []
    real = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda *a: (read.append(a[0]), real(*a))[1])
    ahead([file])
    ahead([file])
    with Digests([file, file], {}) as running:
        found = running.result()
    assert [digest.sha256 for digest in found] == 2 * [hashlib.sha256(content).hexdigest()]
    assert read == [file]


def test_a_file_that_is_gone_is_told_where_its_digest_is_needed(tmp_path: Path) -> None:
    file = _file(tmp_path, b"weights")
    (tmp_path / "weights").unlink()
    ahead([file])
    with Digests([file], {}) as running, pytest.raises(PipelineError, match="weights: cannot be opened"):
        running.result()


def test_nobody_waits_for_what_failed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    files, real = [_file(tmp_path, b"weights"), _file(tmp_path / "one", b"more")], digests._sha256

    def broken(*_: object) -> str:
        raise RuntimeError("of a kind that nobody foresaw")

    monkeypatch.setattr(digests, "_sha256", broken)
    ahead(files)
    wait([digests._COMING[file] for file in files], timeout=10)
    monkeypatch.setattr(digests, "_sha256", real)
    with Digests(files, {}) as running:
        assert running._future.result(timeout=10)[1].sha256 == hashlib.sha256(b"more").hexdigest()
