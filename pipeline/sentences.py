"""What Hydra and OmegaConf say of a request, as one sentence: the key, the value, what would be right."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pipeline.ground.names import nearest

_PLUGINS = {
    "launcher": "; pip install 'lora-pipeline[sweeps]' brings joblib, submitit_local and submitit_slurm",
    "sweeper": "; pip install hydra-optuna-sweeper brings optuna",
}
_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}


def sentence(
    text: str, recipes: Collection[str], stages: Mapping[str, Collection[str]], keys: list[str]
) -> str:
    """The sentence for an error's text (with that of its cause); names and keys are what could be meant."""
    if found := re.search(r"Could not (?:find|load) '(\w+)/([^'\n]*)'", text):
        slot, name = found.groups()
        if slot == "hydra":
            group, _, name = name.rpartition("/")
            return f"hydra/{group}: nothing here is called '{name}'{_PLUGINS.get(group, '')}"
        if slot == "recipe":
            return f"recipe: no recipe '{name}'{nearest(name, recipes)}; there are {_listed(recipes)}"
        return f"{slot}: no stage '{name}'; choose {_listed(stages.get(slot, ()))}"
    if found := re.search(r"Ambiguous value for argument '([^'=]*)=(.*?)'\n", text):
        return f"{found[1]}: {found[2]} are several values; add -m for a run with each, or write a [list]"
    key = _key(text)
    if found := re.search(r"Key '([^']*)' (?:is )?not in '?\w+'?", text):
        return _unknown(key or found[1], keys)
    if found := re.search(r"Could not (?:override|delete from config\.) ?'([^']*)'", text):
        return _unknown(found[1], keys)
    if found := re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text):
        return f"{key}: '{found[1]}' is none of {found[2]}"
    if found := re.search(
        r"Value (.*?) (?:\(DictConfig\)|\(ListConfig\)) is not a valid input for .*'(\w+)'>", text
    ):
        return f"{key}: {found[1]} is a table or list; give one value"
    if found := re.search(r"Value '(.*?)' of type '\w+' could not be converted to (\w+)", text):
        return f"{key}: '{found[1]}' is not {_KINDS.get(found[2], found[2])}"
    if found := re.search(r"Value '(.*?)' is not a valid bool", text):
        return f"{key}: '{found[1]}' is not true or false"
    if found := re.search(r"Cannot convert '\w+' to string: '(.*)'", text):
        return f"{key}: {found[1]} is a table or list; give one value, as text"
    if found := re.search(r"Interpolation key '(.*?)' not found", text):
        return f"{key or 'recipe'}: refers to '{found[1]}', which is no key"
    lines = [line for line in text.splitlines() if line and "raised while composing config" not in line]
    first = lines[0] if lines else text
    return f"{key}: {first}" if key and key not in first else first


def _unknown(key: str, keys: Collection[str]) -> str:
    if key in keys:
        return f"{key}: no such key of the stage that is chosen here"
    return f"{key}: no such key{nearest(key, keys)}"


def _key(text: str) -> str | None:
    found = re.search(r"full_key: (\S+)", text) or re.search(r"Error merging override (\S+?)=", text)
    return found[1] if found else None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
