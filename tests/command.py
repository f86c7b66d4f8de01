"""`python -m pipeline`, as a user types it: in a process of its own, or (faster) in this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ARGUMENTS = ("base_model=base", "adapter=adapter", "output=out")


class Answer(NamedTuple):
    """What a request came to."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The sentences on stderr."""
        return [line.removeprefix("error: ") for line in self.err.splitlines()]


def run(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def answer(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Answer:
    """The command's main() in this process: for all that neither a signal nor an import decides."""
    from pipeline.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", ["pipeline", *arguments]),
        mock.patch.dict(os.environ, env or {}),
    ):
        try:
            status = main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return Answer(status, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path below the folder; of files, size and time of change."""
    found: dict[str, tuple[int, int] | None] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[path.relative_to(folder).as_posix()] = None if is_folder else (stat.st_size, stat.st_mtime_ns)
    return found


def refused(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    """The sentences of a request that must be refused: exit status 2, no traceback, nothing written."""
    before = listing(folder)
    said = answer(*arguments, cwd=folder, env=env)
    assert said.status == 2, said
    assert said.err.strip(), "refused without a word"
    assert all(line.startswith("error: ") for line in said.err.splitlines()), said.err
    assert listing(folder) == before
    return said.errors


def refusal(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """The one sentence of a request in which one thing is wrong."""
    sentences = refused(folder, *arguments, env=env)
    assert len(sentences) == 1, sentences
    return sentences[0]
