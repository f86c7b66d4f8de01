"""SHA-256 of files: of inputs, beside the work; the Hub's own digests are taken over where it gave them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

from pipeline.ground import identity, reuse
from pipeline.ground.files import File, read_into

_CHUNK = 1 << 20  # between two looks at Python
_LONG_CHUNK = 32 << 20  # while libraries are being imported: each look takes milliseconds then
_SAMPLE, _NUM_SAMPLES = 1 << 12, 256


@dataclass(frozen=True, slots=True)
class Digest:
    """What identifies a file's content; `inherited` when the Hub said so and it was not read for it."""

    name: str
    num_bytes: int
    sha256: str
    inherited: bool = False


_KNOWN: dict[File, str] = {}  # runs of one process share their inputs; a file that changes is another File
_COMING: dict[File, Future[None]] = {}  # done when the file is known, or could not be read


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


def ahead(files: Iterable[File]) -> None:
    """Begins to hash files that `Digests` will be asked for later, on a thread that no exit waits for."""
    coming = {file: Future[None]() for file in files if file not in _KNOWN and file not in _COMING}
    _COMING.update(coming)

    def all_of_them() -> None:
        for file, done in coming.items():
            with suppress(Exception):  # whoever needs the digest takes it anew, and meets what is wrong
                _KNOWN[file] = _shared(file, lambda: False, _LONG_CHUNK)
            done.set_result(None)

    Thread(target=copy_context().run, args=(all_of_them,), name="digest", daemon=True).start()


def _shared(file: File, stopped: Callable[[], bool], chunk: int) -> str:
    """The digest, also from or for the other runs of a sweep."""
    return reuse.text(partial(identity.digest, "sha256", file), lambda: _sha256(file, stopped, chunk))


class _StoppedError(Exception):
    """Nobody waits for the digest any more."""


def _sha256(file: File, stopped: Callable[[], bool], chunk: int = _CHUNK) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(chunk, file.size))
    with file.opened() as descriptor:
        for offset in range(0, file.size, chunk):
            if stopped():
                raise _StoppedError
            part = memoryview(buffer)[: min(chunk, file.size - offset)]
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
        while file in _COMING and wait([_COMING[file]], timeout=0.1).not_done:
            if self._stopped:
                raise _StoppedError
        if file not in _KNOWN:
            _KNOWN[file] = _shared(file, lambda: self._stopped, _CHUNK)
        return _KNOWN[file]

    def result(self) -> list[Digest]:
        """The digests, in the order of the files."""
        return self._future.result()

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True)
