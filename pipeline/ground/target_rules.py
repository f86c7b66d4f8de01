"""Which modules the fields of an adapter_config.json name, as PEFT 0.21.2 reads them.

`tuners_utils.check_target_module_exists` for LoRA, `other._set_trainable` for modules saved whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.ground.base_modules import prefixes, suffixes

ALL_LINEAR = "all-linear"
# Whether modules_to_save rules a module out, and which layer it is in; PEFT escapes nothing.
_SAVED = r"(^|.*\.){}($|\..*)"
_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # `h.0.attn`, with nothing before the stack, is in no layer
_NO_LINEAR = re.compile(r"(.*\.)?([^.]*(norm|embed|lm_head)[^.]*|wte|wpe|ln_[^.]*)")

Test = Callable[[str], bool]


def targeting(config: Mapping[str, Any]) -> Test:
    """Whether PEFT puts LoRA on a module of this name.

    Without target_modules: whether no other field rules it out. `all-linear` asks for the class of a
    module; here it means all but embeddings, heads and norms by name.
    """
    targets, saved = config.get("target_modules"), config.get("modules_to_save") or []
    excluded, named = _naming(config.get("exclude_modules") or []), _naming(targets or [])
    taken = [re.compile(_SAVED.format(name)) for name in saved]
    in_layers = _in_layers(config)

    def is_targeted(module: str) -> bool:
        if excluded(module) or any(pattern.match(module) for pattern in taken):
            return False
        if targets is None:
            return not config.get("target_parameters") and in_layers(module)
        if is_all_linear(config):
            return not _NO_LINEAR.fullmatch(module)
        # A list's entry that is the whole name holds in every layer.
        return named(module) and (isinstance(targets, str) or module in targets or in_layers(module))

    return is_targeted


def excluding(config: Mapping[str, Any]) -> Test:
    """Whether exclude_modules means a module."""
    return _naming(config.get("exclude_modules") or [])


def saving(config: Mapping[str, Any]) -> Test:
    """Whether modules_to_save means a module or one that it is part of.

    Any ending will do: `head` means lm_head, though it does not rule out LoRA on it.
    """
    entries = tuple(config.get("modules_to_save") or ())
    return lambda module: any(above.endswith(entries) for above in prefixes(module))


def is_all_linear(config: Mapping[str, Any]) -> bool:
    """Whether target_modules is `all-linear`; PEFT writes the names that it found in its place."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def wrong_fields(config: Mapping[str, Any]) -> list[str]:
    """What cannot be of these fields: sentences that begin with the field's name."""
    wrong = []
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        if not isinstance(value := config.get(field), str | None) and not _is_list(value, str):
            wrong.append(f"{field} is {value!r}, neither a pattern nor a list of names")
    for field in ("modules_to_save", "target_parameters"):
        if (value := config.get(field)) is not None and not _is_list(value, str):
            wrong.append(f"{field} is {value!r}, not a list of names")
    layers, tokens = config.get("layers_to_transform"), config.get("trainable_token_indices")
    if layers is not None and not _is_list([layers], int) and not _is_list(layers, int):
        wrong.append(f"layers_to_transform is {layers!r}, neither a number nor a list of numbers")
    if tokens is not None and not all(_is_list(rows, int) for rows in _rows(tokens)):
        wrong.append(f"trainable_token_indices is {tokens!r}, neither a list of numbers nor a table of them")
    return wrong or _wrong_patterns(config)


def _wrong_patterns(config: Mapping[str, Any]) -> list[str]:
    wrong = []
    for field, shape in (
        ("target_modules", "{}"),
        ("exclude_modules", "{}"),
        ("modules_to_save", _SAVED),
        ("layers_pattern", _LAYER),
    ):
        value = config.get(field) or []
        entries = [value] if isinstance(value, str) else value if shape != "{}" else []
        for entry in entries:
            try:
                re.compile(shape.format(entry))
            except re.error as error:
                wrong.append(f"{field} has {entry!r}, which is no regular expression ({error})")
    return wrong


def _rows(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else [tokens]


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, of) and not isinstance(v, bool) for v in value)


def _naming(names: str | list[str]) -> Test:
    """Whether a pattern is the whole name, or an entry of a list its ending."""
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda module: pattern.fullmatch(module) is not None
    entries = frozenset(names)
    return lambda module: not entries.isdisjoint(suffixes(module))


def _in_layers(config: Mapping[str, Any]) -> Test:
    """Whether layers_to_transform has the layer that a module is in: its first number, or after a pattern."""
    layers, names = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return lambda module: True
    wanted = layers if isinstance(layers, list) else [layers]
    shapes = [_LAYER.format(name) for name in ([names] if isinstance(names, str) else names)]
    patterns = [re.compile(shape) for shape in shapes or [_ANY_LAYER]]

    def is_within(module: str) -> bool:
        found = next(filter(None, (pattern.match(module) for pattern in patterns)), None)
        layer = found and found["idx"]  # a pattern with `|` can match without it
        return layer is not None and int(layer) in wanted

    return is_within
