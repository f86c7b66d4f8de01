"""An adapter's keys, taken apart word by word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.ground.formulas import low_rank, values
from pipeline.ground.formulas.module import Formula
from pipeline.ground.formulas.table import FORMULAS

_WRAPPERS = frozenset({"base_layer", "modules_to_save", "token_adapter"})  # PEFT's own, around a module
_IDLE = frozenset({"original_module", "lora_velora_embed", "lora_monteclora_sampler"})  # change nothing


@dataclass(frozen=True)
class Trained:
    """What the file holds for one parameter of one module: keys by the tensors' names.

    `named` is the module as the config's patterns mean it, `depth` how many wrappers lie around this one,
    `inner` whether it lies within another's (the out_proj of a MultiheadAttention).
    """

    module: str
    parameter: str
    formula: Formula
    keys: Mapping[str, str]
    named: str
    depth: int = 0
    inner: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether it is the parameter itself."""
        return self.formula is values.saved


def read(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[list[Trained], dict[str, str]]:
    """What all keys are for, parameters that are saved whole first; and those that all modules share."""
    known = FORMULAS[config["peft_type"]]
    modules: dict[tuple[str, ...], dict[str, str]] = {}
    whole: dict[tuple[str, str], str] = {}
    shared: dict[str, str] = {}
    for key in sorted(keys):
        words = key.split(".")
        words = words[:-2] + [word for word in words[-2:] if word != "default"]
        if words[1] != "model":
            shared[words[-1]] = key
        elif not _IDLE.isdisjoint(words):
            continue
        elif own := next((at for at, word in enumerate(words) if word in known), None):
            tensor = ".".join(words[own:]).removesuffix(".weight")
            modules.setdefault(tuple(words[2:own]), {})[tensor] = key
        else:
            module = ".".join(word for word in words[2:-1] if word not in _WRAPPERS)
            whole.setdefault((module, words[-1]), key)
    found = [Trained(name, kind, values.saved, {"": key}, name) for (name, kind), key in whole.items()]
    for path, tensors in modules.items():
        found += _of_module(path, tensors, known, config)
    return found, shared


def _of_module(
    path: tuple[str, ...], tensors: Mapping[str, str], known: Mapping[str, Formula], config: Mapping[str, Any]
) -> Iterator[Trained]:
    words = [word for word in path if word not in _WRAPPERS]
    depth = next(n for n in range(len(path) + 1) if n == len(path) or path[-1 - n] != "base_layer")
    inner = "base_layer" in path[: len(path) - depth]
    module = ".".join(words)
    named = ".".join(path[: path.index("base_layer")]) if inner else module
    formula = known[next(iter(tensors)).split(".")[0]]
    if formula is values.saved:
        for tensor, key in tensors.items():
            parameter = "bias" if tensor.endswith(".bias") else "weight"
            yield Trained(module, parameter, formula, {"": key}, named)
        return
    yield Trained(module, "weight", formula, tensors, named, depth, inner)
    if "lora_B.bias" in tensors:
        yield Trained(module, "bias", low_rank.bias, tensors, named)
    if formula is values.ia3 and not values.is_feedforward(module, config):
        yield Trained(module, "bias", formula, tensors, named)
