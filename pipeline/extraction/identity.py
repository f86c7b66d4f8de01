"""What the numbers of an extraction depend on, as keys under which they can be found again.

Weights, places and rules are frozen dataclasses of names, offsets, numbers and text: what one says of itself
is all that its values depend on, but for the content of files. That is known by path, size and time of
change, and by samples, since folders that were unpacked may share all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pipeline.ground.device import hardware
from pipeline.ground.digests import sampled
from pipeline.ground.files import File
from pipeline.ground.manifest import library_version, own_version


def key(*parts: object) -> str:
    """A name for whatever depends on these and on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:40]


def surroundings(files: Iterable[File], device: str) -> str:
    """Content of the inputs, versions and kind of device: what all results have in common."""
    inputs = sorted({(file, sampled(file)) for file in files}, key=repr)
    return key(inputs, own_version(), library_version("torch"), hardware(device))
