"""What an output says of itself: config, index, side files, model card, and merge.json with all hashes."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline.ground.digests import Digest, sha256
from pipeline.ground.files import File
from pipeline.ground.hub import Source, is_hub_id
from pipeline.ground.metrics import Statistics
from pipeline.ground.report import Plan
from pipeline.ground.shards import INDEX, SINGLE, index_text

NAME = "merge.json"
_LIBRARIES = ("torch", "safetensors", "transformers", "peft", "gguf", "hydra-core")


@dataclass(frozen=True)
class Origin:
    """Where an input came from, as it may be published: no paths of this machine."""

    name: str
    repo: str | None
    commit: str | None


def published(source: Source) -> Origin:
    """An input by its hub id, or by the name of its folder or file alone."""
    return Origin(source.repo or source.folder.name, source.repo, source.commit)


@dataclass(frozen=True)
class Contents:
    """All that save has in hand when the shards are written."""

    plan: Plan
    config: str
    side_files: Mapping[str, str]  # name: whose it is
    base: Origin
    adapters: Sequence[tuple[Origin, float]]  # with their weights
    trained_on: Any  # what the adapter says of its base
    inputs: Sequence[Digest]
    owners: Sequence[str]  # of each: base, adapter or finetune
    shards: Mapping[str, Sequence[str]]
    digests: Sequence[Digest]
    statistics: Mapping[str, Statistics]
    finetune: Origin | None = None  # where the adapter was extracted from one
    num_bytes: int | None = None  # of all tensors as they were written; default: as they were planned


def write_beside(folder: Path, contents: Contents) -> dict[str, Any]:
    """Writes everything but the shards, config.json and index last; gives the manifest for merge.json.

    The shards stand complete by then: before that no loader takes the folder for a model.
    """
    (folder / "README.md").write_text(model_card(contents), "utf-8")
    if list(contents.shards) != [SINGLE]:
        weight_map = {name: shard for shard, names in contents.shards.items() for name in names}
        plan = contents.plan
        size = plan.num_bytes if contents.num_bytes is None else contents.num_bytes
        (folder / INDEX).write_text(index_text(weight_map, size, plan.num_parameters), "utf-8")
    (folder / "config.json").write_bytes(contents.config.encode())
    shards = {digest.name: digest for digest in contents.digests}
    beside = sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p, folder))
    beside = [path for path in beside if path.name not in shards]
    hashed = [_hashed(folder, path) for path in beside]
    return {
        "format": 1,
        **versions(),
        "base": asdict(contents.base),
        "adapters": [{**asdict(origin), "weight": weight} for origin, weight in contents.adapters],
        **({"finetune": asdict(contents.finetune)} if contents.finetune else {}),
        "inputs": owned(contents.inputs, contents.owners),
        "outputs": [asdict(digest) for digest in (*contents.digests, *hashed)],
        "side_files": dict(contents.side_files),
        "weights": {
            w.name: {
                "action": w.action.name,
                "from": w.source,
                "dtype": w.dtype,
                **({"deltas": list(w.deltas)} if w.deltas else {}),
                **_kept(contents.statistics.get(w.name), w.base_shift),
            }
            for w in contents.plan.weights
        },
    }


def owned(inputs: Sequence[Digest], owners: Sequence[str]) -> list[dict[str, Any]]:
    """The input files, each with whose it is."""
    return [{**asdict(digest), "of": of} for digest, of in zip(inputs, owners, strict=True)]


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether it is no part of the output: a mark of the run, or what it keeps for a while."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _hashed(folder: Path, path: Path) -> Digest:
    file = File.at(path)
    return Digest(path.relative_to(folder).as_posix(), file.size, sha256(file))


def _kept(facts: Statistics | None, planned: float | None) -> dict[str, Any]:
    if facts is None:
        return {}
    shift = planned if facts.base_shift is None else facts.base_shift
    return {
        "retained": facts.retained,
        "changed_fraction": facts.changed_fraction,
        "relative_norm": facts.relative_norm,
        **({} if facts.rounding == "nearest" else {"rounding": facts.rounding}),
        **({} if facts.noise is None else {"noise": facts.noise}),
        **({} if shift is None else {"base_shift": shift}),
    }


def model_card(contents: Contents) -> str:
    """README.md with the Hub's metadata: what was merged into what, and how it was rounded."""
    plan = contents.plan
    base_model = contents.base.repo or contents.trained_on
    hub_id = base_model if isinstance(base_model, str) and is_hub_id(base_model) else None
    metadata = [
        *([f"base_model: {hub_id}"] if hub_id else []),
        "base_model_relation: finetune",
        "library_name: transformers",
        "tags:",
        "- merge",
        "- lora",
    ]
    merged = [w for w in plan.weights if w.deltas]
    kinds = sorted({delta for w in merged for delta in w.deltas})
    adapters = " + ".join(f"`{origin.repo or origin.name}`" for origin, _ in contents.adapters)
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# {plan.adapter} merged into {contents.base.name}",
        "",
        f"The adapter {adapters} merged into the weights of",
        f"`{contents.base.repo or contents.base.name}`: {len(merged)} of {len(plan.weights)} weights changed "
        f"({'; '.join(kinds[:4])}{'; ...' if len(kinds) > 4 else ''}),",
        f"computed in {plan.merge_dtype}, {_stored(plan)}.",
        "",
        f"`{NAME}` holds the hashes of everything that went in and came out, `report.json` the verification.",
        "",
        f"Made with lora-pipeline {own_version()}.",
        "",
    ]
    return "\n".join(lines)


def _stored(plan: Plan) -> str:
    """How the weights became what is stored: rounded once to bfloat16."""
    codes = sorted({w.dtype for w in plan.weights if w.codes and w.encoder})
    if codes:
        return f"quantized to {', '.join(codes)}; what is not quantized, rounded once to {plan.dtype}"
    how = {"nearest": "rounded once", "stochastic": "rounded once, by chance,"}
    return f"{how.get(plan.rounding, 'rounded once, by chance where that keeps more,')} to {plan.dtype}"


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """A table as JSON, readable, ending in a newline; null for a number that is not finite."""
    text = json.dumps(_finite(table), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def own_version() -> str:
    """The version of this package; "unknown" in a bare checkout."""
    return library_version("lora-pipeline") or "unknown"


def versions() -> dict[str, dict[str, str]]:
    """What made this: our own version, and those of the libraries that have a part in it."""
    libraries = {name: found for name in _LIBRARIES if (found := library_version(name))}
    return {"tool": {"lora-pipeline": own_version()}, "libraries": libraries}


def library_version(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_memory() -> int:
    """Most bytes this process has held in memory so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
