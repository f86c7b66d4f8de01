"""Hashes made ahead of their use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.ground import digests
from pipeline.ground.digests import Digests, ahead
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
    with Digests([file], {}) as running, pytest.raises(Exception, match="weights"):
        running.result()
