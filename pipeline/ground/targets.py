"""What adapter_config.json promises to have trained, held against what the adapter file has tensors for.

PEFT fills what a file lacks with fresh weights and a warning; a merge of files would pass over it in
silence. So a file that lost lm_head or layer 17 is refused. What a model in memory may never have had is
no more than a finding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from pipeline.ground.base_modules import (
    BaseModules,
    Module,
    base_modules,
    by_number,
    plain,
    prefixes,
    suffixes,
)
from pipeline.ground.canonical_names import stack
from pipeline.ground.errors import Refused
from pipeline.ground.target_entries import meant_by, unanswered
from pipeline.ground.target_rules import Test, is_all_linear, saving, targeting, wrong_fields

CONFIG = "adapter_config.json"
# A base's files may lack these though a model in memory has them: tied to the embeddings, or made anew.
_HEADS = frozenset(["classifier", "embed_out", "lm_head", "output", "qa_outputs", "score"])
# Tasks whose model has the embeddings and the head that a pattern may mean; None where it is not said.
_GENERATING = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
_ENDS = ("embed_tokens", "lm_head")
_ROUTER = re.compile(r"(.*\.)?([^.]*router[^.]*|[^.]*_gate|gate|wg)(\.[^.]*)?")
_LINEAR = re.compile(r"[^.]*proj[^.]*|(fc|dense|linear|query|key|value|c_)[^.]*|qkv|w[1-3]")


@dataclass(frozen=True, slots=True)
class Promise:
    """What a config promises of a base, by the adapter's own names of modules."""

    trained: Mapping[str, str]
    """modules with LoRA, each with the base's weight, that the file has or must have"""
    unmet: Mapping[str, tuple[str, ...]]
    """by field of the config: its entries that no module of the file answers, though one must"""
    gone: int
    """parameters of what modules_to_save lists and the file lacks, as far as the base tells"""
    lost: tuple[str, ...]
    """modules that the file lacks though it has others of their kind, or of their layers"""
    slips: Mapping[str, tuple[str, ...]]
    """by field of the config: entries that neither the file nor the base answers"""
    unsure: tuple[str, ...]
    """modules of the base that the file lacks, and a model in memory may lack too"""
    shared: tuple[str, ...]
    """keys and values of the last layers, which a model that shares those of earlier ones lacks in memory"""
    apart: Mapping[str, int]
    """stacks of layers in which the file has nothing: how many modules there the config means"""


def expected_modules(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Those of `modules`, named as in a model in memory, that PEFT puts LoRA on by this config.

    Give `all-linear` linear layers only. Without target_modules none: PEFT's table by architecture is no
    promise of the config's. Refused if a field is not what it must be.
    """
    if wrong := wrong_fields(config):
        raise Refused(*(f"{CONFIG}: {sentence}" for sentence in wrong))
    if config.get("target_modules") is None:
        return set()
    return set(filter(targeting(config), modules))


def unkept(
    config: Mapping[str, Any],
    file_modules: Collection[str],
    base: Mapping[str, tuple[int, ...]],
    num_layers: int | None = None,
    renames: Mapping[str, str] = {},
) -> tuple[list[str], list[str]]:
    """(refusals, findings): a sentence each on what the config promises and the file lacks.

    `file_modules`: all that the file has LoRA, saved modules or token rows for, but not copies that PEFT
    saves along. `base`: the decoded shapes of the checkpoint's weights by its files' names. `num_layers`:
    the language model's, where the files may have more. `renames`: {from: to} from the adapter's names to
    the base's.
    """
    if wrong := wrong_fields(config):
        return [f"{CONFIG}: {sentence}" for sentence in wrong], []
    found = promise(config, file_modules, base, num_layers, renames)
    refusals = [
        f"has nothing for {_quoted(entries)}, which {CONFIG} lists in {field}"
        + (f": {found.gone:,} parameters" if field == "modules_to_save" and found.gone else "")
        for field, entries in found.unmet.items()
    ]
    if found.lost:
        were = "was" if len(found.lost) == 1 else "were"
        refusals.append(f"has nothing for {_some(found.lost)}, which {CONFIG} says {were} trained")
    return refusals, list(_findings(found))


def _findings(found: Promise) -> Iterator[str]:
    for field, entries in found.slips.items():
        yield f"has nothing for {_quoted(entries)}, which {CONFIG} lists in {field}; nor has the base"
    for tower, count in found.apart.items():
        means = f"that {CONFIG} means; right if its model lacked them"
        yield f"has none of the {count} modules under '{tower}' {means}"
    if found.unsure:
        yield f"has nothing for {_some(found.unsure)}, which {CONFIG} means; right if its model lacked them"
    if found.shared:
        yield f"has nothing for {_some(found.shared)}; right if its last layers take keys of earlier ones"


def _quoted(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
    return ", ".join(f"'{entry}'" for entry in entries[:4]) + more


def _some(modules: Sequence[str]) -> str:
    return f"'{modules[0]}'" + (f" and {len(modules) - 1:,} more modules" if len(modules) > 1 else "")


def promise(
    config: Mapping[str, Any],
    file_modules: Collection[str],
    base: Mapping[str, tuple[int, ...]],
    num_layers: int | None = None,
    renames: Mapping[str, str] = {},
) -> Promise:
    """What the config promises of this base, sorted by what the file has of it; arguments as of `unkept`."""
    held = {plain(module) for module in file_modules}
    known = base_modules(held, ((name, len(shape)) for name, shape in base.items()), num_layers, renames)
    targeted, saved = targeting(config), saving(config)
    unmet, slips = _unmet_and_slips(config, held, known, targeted)
    trained = {m.name: m for m in known.modules if m.is_matrix and _is_meant(m, config, known, targeted)}
    told, pattern = set(unmet.get("target_modules", ())), isinstance(config.get("target_modules"), str)
    missing = [m for m in trained.values() if m.name not in held and told.isdisjoint(suffixes(m.name))]
    unsure = {m.name for m in missing if m.kind not in known.kinds and _is_unsure(m, config, known)}
    shared = _shared_keys([m for m in missing if m.name not in unsure], trained.values(), held)
    lost = {m.name for m in missing} - unsure - shared
    lost |= {m.name for m in known.modules if m.kind in known.kinds and saved(m.name)} - held
    if parameters := config.get("target_parameters"):
        owners = {entry.rpartition(".")[0] for entry in parameters}
        lacking = known.lacking({m for m in held if not targeted(m) and not saved(m)})
        lost |= {m for m in lacking if "" in owners or not owners.isdisjoint(suffixes(m))}
    apart = {tower: meant for tower, names in known.apart.items() if (meant := list(filter(targeted, names)))}
    if pattern and not any(map(stack, known.own)):  # not one layer of any tower
        lost |= {name for names in apart.values() for name in names}
        apart = {}
    gone = saving({"modules_to_save": unmet.get("modules_to_save")})
    spared = unsure | shared
    return Promise(
        {name: m.weight for name, m in trained.items() if name not in spared},
        unmet,
        sum(prod(base[m.weight]) for m in known.modules if gone(m.name)),
        tuple(sorted(lost, key=by_number)),
        slips,
        tuple(n for n in sorted(unsure, key=by_number) if held.isdisjoint(prefixes(n))),
        tuple(sorted(shared, key=by_number)),
        {tower: len(names) for tower, names in apart.items()},
    )


def _unmet_and_slips(
    config: Mapping[str, Any], held: Collection[str], known: BaseModules, targeted: Test
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Entries that the file does not answer though a module must be there, and those that name nothing."""
    modules = {m.name for m in known.modules} | {name for names in known.apart.values() for name in names}
    unmet: dict[str, tuple[str, ...]] = {}
    slips: dict[str, tuple[str, ...]] = {}
    for field, entries in unanswered(config, held).items():
        meant = {entry: meant_by(entry, field, modules) for entry in entries}
        if field == "target_modules":  # an entry that other fields rule out everywhere need not be there
            meant = {entry: names for entry, names in meant.items() if not names or any(map(targeted, names))}
        certain = not modules or field == "trainable_token_indices"
        must = [e for e, names in meant.items() if names or certain or e.rpartition(".")[2] in _HEADS]
        none = [e for e in meant if e not in must]
        if must:
            unmet[field] = tuple(must)
        if none:
            slips[field] = tuple(none)
    return unmet, slips


def _is_meant(module: Module, config: Mapping[str, Any], known: BaseModules, targeted: Test) -> bool:
    if config.get("target_modules") is None:  # by PEFT's table, which the file shows well enough
        return module.kind in known.kinds and targeted(module.name)
    # A VLM's files may have it under language_model; in memory it is always on top.
    if is_all_linear(config) and module.dims != 2:
        return False
    return targeted(module.name) or (module.canonical == "lm_head" and targeted("lm_head"))


def _is_unsure(module: Module, config: Mapping[str, Any], known: BaseModules) -> bool:
    """Whether a model in memory may lack this, or have it in a form that LoRA does not take."""
    last = module.canonical.rpartition(".")[2]
    if not module.stack:
        by_pattern = isinstance(config["target_modules"], str) and not is_all_linear(config)
        return not by_pattern or last not in _ENDS or config.get("task_type") not in _GENERATING
    if "experts" in module.canonical.split(".") or _ROUTER.fullmatch(module.canonical):
        return True
    if is_all_linear(config) and (config.get("target_parameters") or not _LINEAR.fullmatch(last)):
        return True
    return module.stack in known.strange


def _shared_keys(missing: Iterable[Module], meant: Collection[Module], held: Collection[str]) -> set[str]:
    """Keys and values that are missing from some layer on to the last, where the file has other modules.

    Gemma 3n and 4 keep them in their files for layers that use those of earlier ones.
    """
    found: set[str] = set()
    for tower in {m.stack for m in missing if _is_key(m)}:
        first = min(m.layer for m in missing if m.stack == tower and _is_key(m))
        tail = [m for m in meant if m.stack == tower and m.layer >= first]
        keys = {m.name for m in tail if _is_key(m)}
        others = {m.layer for m in tail if m.name in held and m.name not in keys}
        if first and keys.isdisjoint(held) and others == {m.layer for m in tail}:
            found |= keys
    return found


def _is_key(module: Module) -> bool:
    return module.kind.endswith((".k_proj", ".v_proj"))
