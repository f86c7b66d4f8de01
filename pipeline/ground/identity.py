"""What plain data say, as one digest: the same in every process, another for anything that differs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground.files import File
from pipeline.ground.sidefiles import Copied, Group, side_files

if TYPE_CHECKING:
    from torch import Tensor


def digest(*parts: Any) -> str | None:
    """SHA-256, in hexadecimal, of data made of dataclasses, tables, lists, paths, text, bytes and numbers.

    None where anything else stands in it: what cannot be told apart is not called the same.
    """
    try:
        text = json.dumps(_plain(parts), separators=(",", ":"), sort_keys=True)
    except TypeError:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def files_in(folder: Path) -> list[File]:
    """The files that lie in a folder, by their sizes and times; of those below it none."""
    return [File.at(path) for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []


def of_outputs(
    model: Callable[[], str | None],
    tokens: Tensor,
    cls: type,
    device: str,
    prompts: Sequence[str] = (),
    tokenizer: Path | None = None,
) -> str | None:
    """A digest of what the outputs of a model on these tokens depend on, given that of its weights.

    Where it answers prompts, those and the files in the folder of its `tokenizer` are among it.
    """
    import torch

    if (weights := model()) is None:
        return None
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    run_by = (torch.__version__, torch.get_num_threads(), device, kind)
    files = [] if tokenizer is None else _tokenizer_files(tokenizer)
    ids = tokens.numpy().tobytes()
    return digest(weights, ids, tuple(tokens.shape), cls.__name__, run_by, list(prompts), files)


def _tokenizer_files(folder: Path) -> list[tuple[str, bytes]]:
    files = [file for file in side_files(folder, "") if isinstance(file, Copied)]
    mine = [file for file in files if file.group in (Group.tokenizer, Group.template)]
    return [(file.name, file.path.read_bytes()) for file in mine]


def _plain(value: Any) -> Any:
    """The value in JSON's terms, with its type wherever JSON has none."""
    if isinstance(value, Enum):
        return {_type(value): value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Path):
        return {"path": os.path.abspath(value)}  # noqa: PTH100  a link stays a link
    if is_dataclass(value) and not isinstance(value, type):
        return {_type(value): {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {"table": [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value)} has no plain form")


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
