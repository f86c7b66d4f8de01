"""Files against the plan and against the base's files, read with the safetensors library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ground.digests import sha256
from pipeline.ground.files import File, read_into
from pipeline.ground.folder import Folder
from pipeline.ground.report import Gate, Plan, PlannedWeight, Status
from pipeline.ground.shards import Entry, read_checkpoint

_CHUNK = 8 << 20


def structure(folder: Path, plan: Plan) -> Gate:
    """Every planned weight stands in the folder with its shape and dtype, and nothing else does."""
    found = {name: (dtype, shape) for name, dtype, shape in Folder(folder).facts()}
    planned = {part.name: (part.dtype, part.shape) for w in plan.weights for part in w.tensors}
    for part in (part for w in plan.weights for part in w.tensors if part.late and part.name in found):
        dtype, shape = found[part.name]
        if (dtype, len(shape)) == (part.dtype, 1) and shape[0] <= part.shape[0]:
            planned[part.name] = found[part.name]  # shorter than it might have been
    wrong = [f"{name} is missing" for name in planned.keys() - found.keys()]
    wrong += [f"{name} is not the base's" for name in found.keys() - planned.keys()]
    wrong += [
        f"{name} is {found[name]}, not {planned[name]}"
        for name in planned.keys() & found.keys()
        if found[name] != planned[name]
    ]
    for shard in read_checkpoint(folder):  # index and headers, held to what a strict reader takes
        if shard.file.path.name not in plan.shards:
            wrong.append(f"{shard.file.path.name} is not a planned file")
    if not (folder / "config.json").is_file():
        wrong.append("config.json is missing")
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    beside = (
        f" and {len(found) - len(plan.weights)} tensors beside codes"
        if len(found) != len(plan.weights)
        else ""
    )
    seen = f"{len(plan.weights)} weights{beside} in {files}"
    if wrong:
        return Gate("structure", Status.failed, f"{min(wrong)} ({len(wrong)} faults)", "as planned")
    return Gate("structure", Status.passed, seen, "every name, shape and dtype as planned")


def different(folder: Path, weights: Sequence[PlannedWeight], sources: Mapping[str, Entry]) -> dict[str, str]:
    """By name, the weights that do not hold the base's very bytes: the first tensor of each that differs.

    `sources` are the base's tensors by name.
    """
    written = {e.name: e for shard in read_checkpoint(folder) for e in shard.entries}
    found = {}
    for weight in weights:
        names = (part.name for part in weight.tensors)
        if (
            first := next((n for n in names if not _same_bytes(written[n], sources.get(n))), None)
        ) is not None:
            found[weight.name] = first
    return found


def _same_bytes(one: Entry, other: Entry | None) -> bool:
    if other is None or one.extent.length != other.extent.length:
        return False
    with one.extent.file.opened() as a, other.extent.file.opened() as b:
        for start in range(0, one.extent.length, _CHUNK):
            size = min(_CHUNK, one.extent.length - start)
            left, right = bytearray(size), bytearray(size)
            read_into(a, one.extent.offset + start, memoryview(left))
            read_into(b, other.extent.offset + start, memoryview(right))
            if left != right:
                return False
    return True


def unchanged(folder: Path, outputs: Sequence[Mapping[str, Any]]) -> Gate:
    """Every file of an output still has the hash that its merge.json gives it."""
    wanted = "the hashes of its merge.json"
    wrong = [str(o["name"]) for o in outputs if not _is_still(folder / str(o["name"]), str(o["sha256"]))]
    if wrong:
        return Gate("hashes", Status.failed, f"{wrong[0]} is another file ({len(wrong)} files)", wanted)
    return Gate("hashes", Status.passed, f"{len(outputs)} files as written", wanted)


def _is_still(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(File.at(path)) == digest
