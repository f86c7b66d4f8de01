"""Module names: what a recipe's patterns and renames match, and which names are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase


def matches(module: str, pattern: str) -> bool:
    """Whether a name, glob or `re:` pattern means this module or one above it, by whole path components.

    `self_attn` means model.layers.0.self_attn.q_proj; `norm` never means input_layernorm. A pattern with
    dots matches that many components in a row; `re:` must match a whole module name.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    parts, wanted = module.split("."), pattern.split(".")
    runs = range(len(parts) - len(wanted) + 1)
    return any(all(fnmatchcase(p, w) for p, w in zip(parts[i:], wanted, strict=False)) for i in runs)


def unreadable(pattern: str) -> str | None:
    """Why a `re:` pattern is none; None for all others."""
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        return f"'{pattern}' is not a regular expression ({error})"
    return None


def unmatched(modules: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The modules that none of the patterns means."""
    patterns = list(patterns)
    return [m for m in modules if not any(matches(m, p) for p in patterns)]


def renamed(module: str, renames: Mapping[str, str]) -> str:
    """The module with its leading components changed by the first of `renames` {from: to} that fits."""
    for old, new in renames.items():
        if module == old or module.startswith(f"{old}."):
            return new + module[len(old) :]
    return module


# Models whose layers are Conv1D, which hold their weights as (in, out), and how those layers are called.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_sw3"})
_CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_conv1d_layer(weight: str) -> bool:
    """Whether a weight is called as those of Conv1D layers are."""
    return bool(set(weight.split(".")[-2:-1]) & _CONV1D_LAYERS)


def is_conv1d(model_type: str | None, weight: str, shape: tuple[int, ...]) -> bool:
    """Whether a model's weight lies as (in, out)."""
    return model_type in _CONV1D_MODELS and len(shape) == 2 and is_conv1d_layer(weight)


# Models whose experts transformers declares as (experts, in, out) with `is_transposed`.
_TURNED_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


def turns_experts(model_type: str | None) -> bool:
    """Whether a model's stacked experts lie as (experts, in, out)."""
    return model_type in _TURNED_EXPERTS


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean X' for the name most like this one, or nothing."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}" if close else ""
