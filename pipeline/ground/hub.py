"""What the user typed for a model - a folder, a file, a Hub id - as what lies on this disk.

Everything that can go wrong on the way is a `Refused` of one sentence. Pickles are never fetched.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.ground.errors import Refused
from pipeline.ground.sidefiles import Group
from pipeline.ground.units import show_bytes
from pipeline.ground.workplace import free_bytes


class Files(NamedTuple):
    """What is wanted of a repository: `allow` less `ignore`. It must hold `weights`."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...]
    weights: str
    choices: str  # what a user may give

    def wants(self, name: str) -> bool:
        return _matches(name, self.allow) and not _matches(name, self.ignore)


PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FRAMEWORKS = ("*.h5", "*.msgpack", "*.ot", "*.onnx*", "onnx/*", "openvino*", "*.tflite", "coreml/*")
PICKLED_WEIGHTS = ("*model*.bin", "*model*.pt", "*model*.ckpt", "consolidated*.pth")
MEDIA = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.pdf")
# The vendor's own format, and weights in folders: other variants, the checkpoints of a training.
OTHER_WEIGHTS = ("*.gguf", "original/*", "consolidated*.safetensors", "*/*.safetensors")

CHECKPOINT = Files(
    allow=("*",),
    ignore=PICKLES + FRAMEWORKS + MEDIA + OTHER_WEIGHTS,
    weights="*.safetensors",
    choices="a folder, a GGUF file or a hub id org/name[@revision]",
)
ADAPTER = Files(
    allow=(
        "adapter_config.json",
        "adapter_model.safetensors",
        *Group.tokenizer.patterns,
        *Group.template.patterns,
        "README.md",
    ),
    ignore=PICKLES,
    weights="adapter_model.safetensors",
    choices="a folder or a hub id org/name[@revision]",
)

# A revision is held to what git allows: it becomes a path in the cache.
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@((?!/)(?!.*\.\.)[^\s~^:?*\\\[]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input lies: `folder` (for GGUF, a file), and `repo` and `commit` if it is a Hub snapshot."""

    folder: Path
    asked: str
    repo: str | None = None
    commit: str | None = None


def locate(key: str, value: str, files: Files = CHECKPOINT, *, download: bool = True) -> Source:
    """The local path that `value` (of the recipe key `key`) names, or the snapshot of that Hub id.

    A commit that the cache holds whole needs no network; any other revision is looked up, and taken from
    the cache if the Hub does not give it. With `download=False` only what is cached is taken.
    Refused: no such path, repository or revision; gated; unreachable; no space; no safetensors.
    """
    try:
        path = Path(os.path.expanduser(value))  # noqa: PTH111  ./~x is no home
        if value.strip() and path.exists():
            return Source(path.absolute(), value)
    except (OSError, RuntimeError) as problem:  # a folder we may not enter, ~nobody
        raise Refused(f"{key}: cannot read '{value}': {problem}") from problem
    match = _HUB_ID.fullmatch(value)
    if not match or value.endswith((".gguf", ".safetensors")):
        raise Refused(f"{key}: '{value}' does not exist; give {files.choices}")
    request = _Request(key, value, match[1], match[2] or "main", files)
    with _quiet():
        folder = _snapshot(request, download)
    return Source(folder, value, request.repo, commit=folder.name)


def is_hub_id(value: str) -> bool:
    """Whether it has the form org/name, and may stand in a model card."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value, re.ASCII) is not None


def digests(source: Source) -> dict[str, str]:
    """File name -> sha256 of the large files of a Hub snapshot, as the Hub told it: nothing is read here.

    Empty for a local path, and where the cache holds copies because its disk has no links.
    """
    if source.repo is None:
        return {}
    # One step, not resolve(): a blob may itself be a link into a store where names are not sha256.
    links = ((path, path.readlink().name) for path in sorted(source.folder.rglob("*")) if path.is_symlink())
    names = {path.relative_to(source.folder).as_posix(): target for path, target in links}
    return {name: target for name, target in names.items() if _SHA256.fullmatch(target)}


@cache  # a request asks for the same several times: one look-up, one commit
def _snapshot(request: _Request, download: bool) -> Path:
    return request.snapshot(download)


@dataclass(frozen=True, slots=True)
class _Request:
    """A Hub id that stands in a recipe, and which of its files are wanted."""

    key: str
    asked: str
    repo: str
    revision: str
    files: Files

    def snapshot(self, download: bool) -> Path:
        """The folder of the snapshot: from the cache, or from the Hub."""
        from huggingface_hub.errors import HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

        try:
            if _COMMIT.fullmatch(self.revision) and (folder := self.cached()) and _is_listed(folder):
                return folder
            missing, storage = self.missing()
            size, free = sum(missing.values()), free_bytes(storage)
            if missing and not download:
                count = f"{len(missing)} file{'s' * (len(missing) > 1)}"
                raise Refused(
                    f"dry_run: {self.key} '{self.asked}' is not in the local cache: "
                    f"a run would first download {show_bytes(size)} ({count})"
                )
            if size > free:
                raise Refused(
                    f"{self.key}: '{self.asked}' needs {show_bytes(size)} in the cache {storage.parent}, "
                    f"where {show_bytes(free)} are free; make room, or set HF_HUB_CACHE to a folder elsewhere"
                )
            return self.fetch()
        except (HTTPError, OSError, ValueError, RuntimeError) as problem:
            if isinstance(problem, RevisionNotFoundError) or not (folder := self.cached()):
                raise Refused(f"{self.key}: {self.told(problem)}") from problem
            return folder

    def fetch(self, local_files_only: bool = False) -> Path:
        """The snapshot, downloaded as far as the cache does not hold it."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.repo,
            revision=self.revision,
            allow_patterns=list(self.files.allow),
            ignore_patterns=list(self.files.ignore),
            local_files_only=local_files_only,
        )
        return Path(folder)

    def cached(self) -> Path | None:
        """The snapshot if the cache holds it whole, as far as the cache can tell (`_is_listed`)."""
        try:
            folder = self.fetch(local_files_only=True)
        except (OSError, ValueError):
            return None
        return folder if any(folder.glob(self.files.weights)) else None

    def missing(self) -> tuple[dict[str, int], Path]:
        """The wanted files that the cache lacks, with their bytes; the repository's folder in the cache."""
        from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

        # The client waits for ever on a network that swallows packets, unless told otherwise.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True, timeout=timeout)
        listing = {file.rfilename: file for file in info.siblings or ()}
        wanted = [name for name in listing if self.files.wants(name)]
        if not any(fnmatch(name, self.files.weights) for name in wanted):
            raise Refused(f"{self.key}: '{self.asked}' holds {_instead(listing, self.files)}")
        storage = Path(constants.HF_HUB_CACHE).absolute() / f"models--{self.repo.replace('/', '--')}"
        missing = {}
        for name in wanted:
            file = listing[name]
            blob = storage / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)
            if not blob.exists() and not (storage / "snapshots" / str(info.sha) / name).exists():
                missing[name] = file.size or 0
        if missing:  # a gated repository lists its files to anyone: ask for one
            get_hf_file_metadata(hf_hub_url(self.repo, next(iter(missing)), revision=info.sha))
        return missing, storage

    def told(self, problem: Exception) -> str:
        """What went wrong, and what to do about it."""
        from huggingface_hub import constants, errors

        if isinstance(problem, errors.LocalEntryNotFoundError) and isinstance(problem.__cause__, Exception):
            problem = problem.__cause__
        asked, repo = f"'{self.asked}'", f"'{self.repo}'"
        match problem:
            case errors.GatedRepoError():
                page = f"{constants.ENDPOINT}/{self.repo}"
                return f"{asked} is gated: accept the licence on {page} and run `hf auth login`"
            case errors.RepositoryNotFoundError():
                return f"the Hub shows no model {repo}; check the name; if it is private, run `hf auth login`"
            case errors.RevisionNotFoundError():
                return f"{repo} has no revision '{self.revision}'; give a branch, a tag or a full commit hash"
            case errors.HfHubHTTPError() if problem.response.status_code in (401, 403):
                return f"the Hub denies access to {asked}; run `hf auth login` with a token that may read it"
            case errors.HfHubHTTPError():
                trouble, remedy = f"the Hub answers {problem.response.status_code}", "try again later"
            case errors.OfflineModeIsEnabled():
                trouble, remedy = "HF_HUB_OFFLINE is set", "unset it"
            case json.JSONDecodeError() | errors.FileMetadataError():
                trouble, remedy = f"{constants.ENDPOINT} does not answer like a Hub", "check HF_ENDPOINT"
            case OSError(errno=int()) | ValueError() | RuntimeError():
                reason = getattr(problem, "strerror", None) or str(problem).partition("\n")[0]
                return f"cannot fetch {asked} into {constants.HF_HUB_CACHE}: {reason}"
            case _:
                trouble, remedy = "cannot reach the Hub", "connect"
        return f"{trouble} and {asked} is not in the local cache; {remedy}, or give a local folder"


def _is_listed(folder: Path) -> bool:
    """Whether the cache knows what belongs to a snapshot: not if another tool fetched single files of it."""
    return (folder.parents[1] / "trees" / f"{folder.name}.json").exists()


def _instead(names: Iterable[str], files: Files) -> str:
    """What a repository holds that has no weights for us, and what to do about it."""
    for patterns, remedy in (
        (PICKLED_WEIGHTS, "convert it to safetensors first"),
        (("*.gguf",), "download the file you want and give its path"),
    ):
        found = [name for name in names if _matches(name, patterns)]
        if found:
            return f"only {', '.join(found[:2])}{' ...' * (len(found) > 2)}: {remedy}"
    return f"no {files.weights} at its top level: give another repository"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the client's warnings, unless the user asked for more, and its bars if nobody looks on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub.utils import logging as client
        from huggingface_hub.utils.tqdm import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        level, bars = client.get_verbosity(), not are_progress_bars_disabled()
        client.set_verbosity(logging.ERROR if level == logging.WARNING else level)
        if bars and not sys.stderr.isatty():
            disable_progress_bars()
        try:
            yield
        finally:
            client.set_verbosity(level)
            if bars:
                enable_progress_bars()
