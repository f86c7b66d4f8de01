"""SHA-256 of files: of inputs, beside the work; the Hub's own digests are taken over where it gave them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.ground import identity, reuse
from pipeline.ground.files import File, read_into

_CHUNK = 1 << 20  # between two looks at Python: while torch is being imported each takes milliseconds
_SAMPLE, _NUM_SAMPLES = 1 << 12, 256


@dataclass(frozen=True, slots=True)
class Digest:
    """What identifies a file's content; `inherited` when the Hub said so and it was not read for it."""

    name: str
    num_bytes: int
    sha256: str
    inherited: bool = False


_KNOWN: dict[File, str] = {}  # runs of one process share their inputs; a file that changes is another File


def sha256(file: File) -> str:
    """The digest of the whole file, in hexadecimal."""
    return _sha256(file, lambda: False)


def sampled(file: File) -> str:
    """A digest of blocks spread over the whole file, the first and the last with them: tells, nearly for
    nothing, files apart that were not made to be mistaken for each other.
    """
    digest, buffer = hashlib.sha256(), bytearray(min(_SAMPLE, file.size))
    last = file.size - len(buffer)
    with file.opened() as descriptor:
        for offset in sorted({last * n // (_NUM_SAMPLES - 1) for n in range(_NUM_SAMPLES)}):
            read_into(descriptor, offset, memoryview(buffer))
            digest.update(buffer)
    return digest.hexdigest()


class _StoppedError(Exception):
    """Nobody waits for the digest any more."""


def _sha256(file: File, stopped: Callable[[], bool]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(_CHUNK, file.size))
    with file.opened() as descriptor:
        for offset in range(0, file.size, _CHUNK):
            if stopped():
                raise _StoppedError
            part = memoryview(buffer)[: min(_CHUNK, file.size - offset)]
            read_into(descriptor, offset, part)
            digest.update(part)
    return digest.hexdigest()


class Digests:
    """Hashes files on a thread of its own while `with` lasts; `result()` waits for it."""

    def __init__(self, files: Iterable[File], known: Mapping[Path, str]) -> None:
        self._files, self._known = list(files), known
        self._stopped = False

    def __enter__(self) -> Digests:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._future: Future[list[Digest]] = self._pool.submit(copy_context().run, self._all)
        return self

    def _all(self) -> list[Digest]:
        found = []
        for file in self._files:
            known = self._known.get(file.path)
            found.append(
                Digest(file.path.name, file.size, known or self._sha256(file), inherited=known is not None)
            )
        return found

    def _sha256(self, file: File) -> str:
        if file not in _KNOWN:
            key = partial(identity.digest, "sha256", file)
            _KNOWN[file] = reuse.text(key, lambda: _sha256(file, lambda: self._stopped))
        return _KNOWN[file]

    def result(self) -> list[Digest]:
        """The digests, in the order of the files."""
        return self._future.result()

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True)
