"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, read as PEFT 0.21 means them.

What is not understood here is refused by name: a field or a tensor that is skipped gives a model that
talks nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry, Shard, read_shard
from pipeline.ground.tables import read_table

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that describe, or say how it was trained, and do not change what the tensors mean.
_INFORMATIVE = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# Fields that change the result, and what each brings; refused when set.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases in lora_B",
    "modules_to_save": "whole modules saved beside the LoRA",
    "trainable_token_indices": "trained token rows",
    "target_parameters": "LoRA on bare parameters (fused experts)",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA, which is active on some tokens only and cannot be merged",
    "arrow_config": "Arrow routing, which cannot be merged",
    "kasa_config": "KaSA, which changes the base",
    "corda_config": "CorDA, which changes the base",
    "loftq_config": "LoftQ, which changes the base",
    "lora_ga_config": "LoRA-GA, which changes the base",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
}
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_KEY_KINDS = (
    ("lora_embedding_", "LoRA on an embedding"),
    ("lora_magnitude_vector", "DoRA magnitudes"),
    (".lora_B.bias", "biases in lora_B"),
    (".base_layer.", "saved or nested base weights"),
    ("trainable_tokens_delta", "trained token rows"),
    (".lora_down.", "kohya's names"),
    (".lora_up.", "kohya's names"),
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read: its config, its tensors, and the deltas by module name."""

    config: Mapping[str, Any]
    shard: Shard
    config_path: Path
    deltas: Mapping[str, Delta]


def read_adapter(folder: Path) -> AdapterFile:
    """Reads an adapter folder; Refused, with every reason, for what is missing or not understood."""
    config, shard = _read_config(folder), read_shard(_find_weights(folder))
    wrong = _wrong_fields(folder / CONFIG, config)
    if wrong:
        raise Refused(*wrong)
    return AdapterFile(config, shard, folder / CONFIG, _deltas(shard, config))


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


def _wrong_fields(path: Path, config: Mapping[str, Any]) -> list[str]:
    wrong = []
    if (kind := config.get("peft_type")) != "LORA":
        wrong.append(f"{path}: peft_type is {kind!r}; this version merges LORA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank):
        wrong.append(f"{path}: r is {rank!r}, not a rank")
    if not _is_number(alpha):
        wrong.append(f"{path}: lora_alpha is {alpha!r}, not a finite number")
    if config.get("bias", "none") != "none":
        wrong.append(
            f"{path}: bias is {config['bias']!r}; this version merges adapters without trained biases"
        )
    if config.get("fan_in_fan_out"):
        wrong.append(
            f"{path}: fan_in_fan_out is set (Conv1D layers of GPT-2), which this version cannot merge"
        )
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        wrong.append(
            f"{path}: init_lora_weights is {init!r}, which changed the base it was trained on; convert the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for field, brings in _UNSUPPORTED.items():
        if config.get(field):
            wrong.append(f"{path}: {field} is set, which means {brings}; this version cannot merge it")
    for field, value in config.items():
        if field not in _INFORMATIVE and field not in _UNSUPPORTED and value not in (None, False, [], {}, ""):
            wrong.append(f"{path}: field {field!r} ({value!r}) is not known and may change the result")
    for field, fits, what in (("rank_pattern", _is_rank, "ranks"), ("alpha_pattern", _is_number, "numbers")):
        table = config.get(field) or {}
        if not isinstance(table, dict) or not all(fits(value) for value in table.values()):
            wrong.append(f"{path}: {field} is {table!r}, not a table of patterns and {what}")
    for field in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(field), bool | None):
            wrong.append(f"{path}: {field} is {config[field]!r}, neither true nor false")
    return wrong


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _deltas(shard: Shard, config: Mapping[str, Any]) -> dict[str, Delta]:
    pairs: dict[str, dict[str, Entry]] = {}
    wrong = []
    for entry in shard.entries:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", entry.name)
        if match and not any(part in entry.name for part, _ in _KEY_KINDS):
            pairs.setdefault(match[1], {})[match[2]] = entry
        else:
            kind = next((kind for part, kind in _KEY_KINDS if part in entry.name), None)
            what = (
                f"({kind}), which this version cannot merge"
                if kind
                else "is not a LoRA tensor as PEFT names it"
            )
            wrong.append(f"{shard.file.path}: '{entry.name}' {what}")
    deltas: dict[str, Delta] = {}
    for module, pair in pairs.items():
        if len(pair) < 2:
            [have] = pair
            lacks = "B" if have == "A" else "A"
            wrong.append(f"{shard.file.path}: '{module}' has lora_{have} but no lora_{lacks}")
        elif reason := _mismatch(module, pair["A"], pair["B"], config):
            wrong.append(f"{shard.file.path}: '{module}' {reason}")
        else:
            A, B = pair["A"], pair["B"]
            scale = scaling(module, config)
            deltas[module] = Lora(module, "weight", (B.shape[0], A.shape[1]), A, B, scale)
    unmet = [] if wrong else _unmet_targets(config, list(deltas))
    wrong += [
        f"{shard.file.path}: has nothing for '{t}', which {CONFIG} lists in target_modules" for t in unmet
    ]
    if wrong:
        raise Refused(*wrong)
    if not deltas:
        raise Refused(f"{shard.file.path}: holds no LoRA tensors")
    return deltas


def _mismatch(module: str, A: Entry, B: Entry, config: Mapping[str, Any]) -> str | None:
    if len(A.shape) != 2 or len(B.shape) != 2:
        return f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}; this version merges linear layers"
    if A.shape[0] != B.shape[1]:
        return f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}, whose ranks differ"
    if A.shape[0] != (rank := _rank(module, config)):
        return f"has rank {A.shape[0]}, but {CONFIG} says {rank}"
    if not {A.dtype, B.dtype} <= DENSE_FLOATS:
        return f"has dtypes {A.dtype} and {B.dtype}; LoRA tensors are F64, F32, F16 or BF16"
    return None


def _rank(module: str, config: Mapping[str, Any]) -> int:
    return int(_pattern(module, config.get("rank_pattern"), config["r"]))


def scaling(module: str, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns that reach this module."""
    alpha, rank = _pattern(module, config.get("alpha_pattern"), config["lora_alpha"]), _rank(module, config)
    return alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(module: str, patterns: Mapping[str, float] | None, otherwise: float) -> float:
    """The value of the first pattern that ends the module's path, as peft.utils.get_pattern_key finds it."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise Refused(f"{CONFIG}: pattern {pattern!r} is not a regular expression ({error})") from None
    return otherwise


def _unmet_targets(config: Mapping[str, Any], modules: list[str]) -> list[str]:
    """The entries of a target_modules list that no module of the file answers, less the excluded ones."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not isinstance(targets, list):
        return []
    unmet = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in modules)]
    if isinstance(excluded, str):
        return [t for t in unmet if not re.fullmatch(excluded, t)]
    return [t for t in unmet if not any(t == x or t.endswith(f".{x}") for x in excluded)]
