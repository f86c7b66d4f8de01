"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, read as PEFT 0.21 means them.

What is not understood here is refused by name: a field or a tensor that is skipped gives a model that
talks nonsense. What the tensors of each kind mean is told in `deltas/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.ground.adapter_keys import EMBEDDINGS, as_peft_names_it, foreign, is_left_behind, saved
from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.dora import Dora
from pipeline.ground.deltas.kind import NOTHING_TOLD, Kind, Told, Trained
from pipeline.ground.deltas.kinds import KINDS, NOT_MERGEABLE
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.deltas.lora_family import changed_base, is_convertible
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.entries import same_values
from pipeline.ground.errors import Refused, each_once
from pipeline.ground.report import Finding
from pipeline.ground.shards import Entry, Shard, read_shard
from pipeline.ground.tables import read_table
from pipeline.ground.target_rules import is_all_linear, targeting, wrong_fields

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of every kind: what they name is checked against the tensors, or says nothing of them.
_COMMON = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
    ]
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read: its config, its tensors, and what they make of which parameters."""

    config: Mapping[str, Any]
    shard: Shard
    config_path: Path
    deltas: tuple[Delta, ...]
    findings: tuple[Finding, ...] = ()


def read_adapter(folder: Path, told: Told = NOTHING_TOLD, initial: Path | None = None) -> AdapterFile:
    """Reads an adapter folder; Refused, with every reason, for what is missing or not understood.

    `initial` is the adapter as it was before training, for inits that took it from the base.
    """
    config, shard = _read_config(folder), read_shard(_find_weights(folder))
    kind = _kind(folder / CONFIG, config)
    wrong = _wrong_fields(folder / CONFIG, config, kind)
    if wrong:
        raise Refused(*wrong)
    deltas, findings = _deltas(shard, config, kind, told)
    if beyond := _untargeted(config, deltas):
        raise Refused(
            f"{shard.file.path}: '{beyond[0]}' has LoRA, but {CONFIG} targets no such module, so PEFT passes "
            f"over it ({len(beyond)} modules)"
        )
    if init := changed_base(config) if kind.peft_type == "LORA" else None:
        deltas += _taken_from_base(folder / CONFIG, config, init, told, initial)
    return AdapterFile(config, shard, folder / CONFIG, deltas, findings)


def _untargeted(config: Mapping[str, Any], deltas: Iterable[Delta]) -> list[str]:
    """The modules with LoRA that target_modules does not name, with what excludes some of its names.

    PEFT wraps the out_proj of a MultiheadAttention along, and both sides of what it keeps tied.
    """
    if config.get("target_modules") is None or is_all_linear(config) or wrong_fields(config):
        return []
    targeted = targeting(config)
    modules = list(dict.fromkeys(d.module for d in deltas if isinstance(d, Lora | Dora)))
    tied = EMBEDDINGS | {"proj_out"} if config.get("ensure_weight_tying") else frozenset[str]()
    paths = [(module, *module.rpartition(".")[::2]) for module in modules]
    return [m for m, owner, last in paths if not targeted(m) and owner not in modules and last not in tied]


def _taken_from_base(
    path: Path, config: Mapping[str, Any], init: str, told: Told, initial: Path | None
) -> tuple[Delta, ...]:
    """What an init that split the base took out of it, as deltas that subtract it."""
    if told.residual_base:
        return ()
    if initial is None or not is_convertible(init):
        also = "; extract.initial takes the adapter as it was before training" if is_convertible(init) else ""
        raise Refused(
            f"{path}: init_lora_weights is {init!r}, which changed the base it was trained on; convert the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, or give that changed base and "
            f"extract.residual_base=true{also}"
        )
    first = read_adapter(initial, replace(told, residual_base=True))
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    if differ := [name for name in names if (first.config.get(name) or None) != (config.get(name) or None)]:
        raise Refused(f"extract.initial: '{initial}' differs from the adapter in {differ[0]}")
    initials = [delta for delta in first.deltas if isinstance(delta, Lora)]
    if {d.module for d in initials} != {d.module for d in first.deltas} or config.get("use_dora"):
        raise Refused(f"extract.initial: '{initial}' holds more than LoRA, which cannot be converted")
    return tuple(replace(delta, scale=-delta.scale) for delta in initials)


def _find_weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise Refused(
            f"{folder}: holds adapter_model.bin, a pickle, which can run code; load it with PEFT and save "
            f"it again as {WEIGHTS}"
        )
    raise Refused(f"{folder}: holds {CONFIG} but not {WEIGHTS}")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Refused(f"adapter: '{folder}' is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    if not path.is_file():
        raise Refused(_no_adapter(folder))
    return read_table(path)


def _no_adapter(folder: Path) -> str:
    inside = sorted((p.parent.name for p in folder.glob(f"*/{CONFIG}")), key=_by_number)
    if inside:
        return f"adapter: '{folder}' is not an adapter but holds some: {', '.join(inside)}; give one of them"
    if (folder / "config.json").is_file():
        return f"adapter: '{folder}' holds a full model, not an adapter; a fine-tuned model goes to finetune="
    return f"adapter: '{folder}' holds no {CONFIG}"


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts checkpoint-90 before checkpoint-500."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _kind(path: Path, config: Mapping[str, Any]) -> Kind:
    name = config.get("peft_type")
    if isinstance(name, str) and name in KINDS:
        return KINDS[name]
    if isinstance(name, str) and name in NOT_MERGEABLE:
        raise Refused(f"{path}: peft_type is {name}: {NOT_MERGEABLE[name]}; it cannot be merged into weights")
    raise Refused(f"{path}: peft_type is {name!r}; this version merges {', '.join(KINDS)}")


def _wrong_fields(path: Path, config: Mapping[str, Any], kind: Kind) -> list[str]:
    wrong = [f"{path}: {sentence}" for sentence in kind.wrong(config)]
    for field, brings in kind.refused.items():
        if config.get(field):
            wrong.append(f"{path}: {field} is set, which means {brings}; it cannot be merged")
    for field, value in config.items():
        known = field in _COMMON or field in kind.fields or field in kind.refused
        if not known and value not in (None, False, [], {}, ""):
            wrong.append(f"{path}: field {field!r} ({value!r}) is not known and may change the result")
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not (isinstance(bias, str) and bias.endswith("_only")):
        wrong.append(f"{path}: bias is {bias!r}, not none, all or {kind.peft_type.lower()}_only")
    return wrong


def _deltas(
    shard: Shard, config: Mapping[str, Any], kind: Kind, told: Told
) -> tuple[tuple[Delta, ...], tuple[Finding, ...]]:
    modules: dict[str, dict[str, Entry]] = {}
    shared: dict[str, Entry] = {}
    whole: dict[tuple[str, str], Saved] = {}
    wrong: list[str] = []
    renamed, unused = [], []
    for entry in shard.entries:
        key = as_peft_names_it(entry.name, kind)
        if key != entry.name:
            renamed.append(entry.name)
        inside = key.removeprefix(PREFIX)
        suffix = next((s for s in kind.tensors if inside.endswith(f".{s}")), None)
        if key.removeprefix("base_model.") in kind.shared:
            shared[key.removeprefix("base_model.")] = entry
        elif not key.startswith(PREFIX):
            wrong.append(
                f"{shard.file.path}: '{entry.name}' is not a tensor as PEFT names it{foreign(entry.name)}"
            )
        elif suffix:
            tensors = modules.setdefault(inside.removesuffix(f".{suffix}"), {})
            if suffix in tensors:
                wrong.append(
                    f"{shard.file.path}: both '{tensors[suffix].name}' and '{entry.name}' mean {key}"
                )
            tensors[suffix] = entry
        elif any(f".{start}" in inside for start in kind.unused) or is_left_behind(inside, config):
            unused.append(entry.name)
        elif delta := saved(inside, entry, config):
            first = whole.setdefault((delta.module, delta.parameter), delta)
            if first is not delta and not same_values(first.entry, entry):
                wrong.append(
                    f"{shard.file.path}: both '{first.entry.name}' and '{entry.name}' mean "
                    f"{delta.module}.{delta.parameter}, and differ"
                )
            elif first is not delta:
                unused.append(entry.name)
        else:
            wrong.append(
                f"{shard.file.path}: '{entry.name}' is no tensor of {kind.peft_type}, and {CONFIG} does not "
                f"account for it{foreign(entry.name)}"
            )
    deltas: list[Delta] = list(whole.values())
    names = frozenset(modules)
    for module, tensors in modules.items():
        try:
            deltas += kind.read(Trained(module, tensors, config, shared, names, told))
        except Refused as refusal:
            wrong += [f"{shard.file.path}: {sentence}" for sentence in refusal.sentences]
    used = {entry.name for delta in deltas for entry in delta.entries} | set(unused)
    if not wrong:
        wrong += [
            f"{shard.file.path}: '{e.name}' is used by no module" for e in shard.entries if e.name not in used
        ]
    if wrong:
        raise Refused(*each_once(wrong))
    if not deltas:
        raise Refused(f"{shard.file.path}: holds no tensors of {kind.peft_type}")
    return tuple(deltas), tuple(_findings(renamed, unused))


def _findings(renamed: list[str], unused: list[str]) -> Iterable[Finding]:
    if renamed:
        yield Finding(
            f"{len(renamed)} of the adapter's keys are not quite as PEFT writes them, as {renamed[0]}; they "
            "were read as they are meant"
        )
    if unused:
        yield Finding(
            f"{len(unused)} tensors served training only, or are there twice, and are not merged, as "
            f"{unused[0]}"
        )
