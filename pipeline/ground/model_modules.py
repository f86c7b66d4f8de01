"""What a model in memory calls the parameters of a checkpoint, and which sort of layer each belongs to.

PEFT finds modules by their names in memory, so an adapter has to speak those. transformers builds the
model without weights; where it does not know it, names of files and shapes have to do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.ground.canonical_names import canonical
from pipeline.ground.names import is_conv1d, turns_experts

_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|wpe|word_embeddings|tok_embeddings|embed_in)")
_ROUTER = re.compile(r".*\.(gate|router|wg)")
# What PEFT takes for projections of single experts wherever a model stacks its experts, and so passes over
# LoRA on dense layers and shared experts (PEFT #3711); as bare parameters it leaves them alone.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_STACKED = re.compile(r"(.*\.)?experts\.(gate_up_proj|down_proj)")
# Classes of which PEFT always saves the head whole, by their ending: its task_type, and how heads are called.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_PARAMETRIZED = ".parametrizations."


class Kind(Enum):
    """The sorts of parameters that LoRA knows, and the rest."""

    linear = "linear"  # (out, in)
    conv1d = "Conv1D"  # (in, out), of GPT-2
    embedding = "embedding"  # (tokens, dim)
    kernel = "convolution"  # (out, in, *k)
    parameter = "bare parameter"  # 2-D, or a stack of matrices: PEFT's target_parameters
    other = "other"  # vectors and the like, which can only be saved whole


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of the model in memory."""

    module: str
    parameter: str
    kind: Kind
    shape: tuple[int, ...]
    is_transposed: bool = False
    """of stacked experts: declared as (experts, in, out)"""
    shared: tuple[str, ...] = ()
    """other parameters of the model that are this very tensor"""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}".lstrip(".")

    @property
    def is_one_of_many(self) -> bool:
        """Whether it is shared otherwise than as embeddings with one head."""
        return bool(self.shared) and self.kind is Kind.other


@dataclass(frozen=True)
class Model:
    """A model's parameters by their canonical names, and the names of all of its modules."""

    places: Mapping[str, Place]
    modules: tuple[str, ...]

    @property
    def head(self) -> str | None:
        """The module that shares the embeddings, where one does and nothing else."""
        shared = (p.shared[0] for p in self.places.values() if p.shared and p.kind is Kind.embedding)
        return next((name.rpartition(".")[0] for name in shared), None)


def in_memory(config: Mapping[str, Any]) -> Model | None:
    """The model that transformers makes of this config.json, without weights; None where it cannot."""
    model = empty_model(config)
    if model is None:
        return None
    places = {canonical(place.name): place for place in _places(model)}
    return Model(places, tuple(name for name, _ in model.named_modules()))


def empty_model(config: Mapping[str, Any]) -> Any:
    """The same model itself, on torch's meta device."""
    import torch
    import transformers

    kind, names = config.get("model_type"), config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if kind not in transformers.CONFIG_MAPPING or cls is None:
        return None
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return cls(transformers.AutoConfig.for_model(**config))
    except Exception:  # whatever transformers makes of a config that it does not like
        return None
    finally:
        transformers.utils.logging.set_verbosity(level)


def _places(model: Any) -> Iterator[Place]:
    """All parameters and all buffers that files hold, each with what PEFT can make of it."""
    named = list(model.named_parameters(remove_duplicate=False))
    sharing: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in named:
        sharing[id(parameter)].append(name)
    stacks = any(_STACKED.fullmatch(name) and parameter.dim() == 3 for name, parameter in named)
    heads = next((TASK_HEADS[t] for end, t in TASKS.items() if type(model).__name__.endswith(end)), ())
    kinds = {path: _kind(path, module, stacks) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        kept = {
            n: b
            for n, b in module.named_buffers(recurse=False)
            if n not in module._non_persistent_buffers_set
        }
        for name, value in (*module.named_parameters(recurse=False), *kept.items()):
            shape, kind = tuple(value.shape), kinds[path]
            whole = f"{path}.{name}".lstrip(".")
            shared = tuple(other for other in sharing.get(id(value), ()) if other != whole)
            matrix = len(shape) >= 2 and (kind is Kind.parameter or name == "weight") and name not in kept
            if not matrix or (shared and not _ends(kind, shared, kinds)):
                kind = Kind.other
            owner, parameter = _owner(whole, heads)
            if _PARAMETRIZED in whole or set(heads) & set(owner.split(".")):
                kind = Kind.other
            yield Place(owner, parameter, kind, shape, bool(getattr(module, "is_transposed", False)), shared)


def _kind(path: str, module: Any, stacks: bool) -> Kind:
    """What PEFT makes of a module's matrices; `stacks`: the model stacks its experts."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    sorts = (
        (nn.modules.linear.NonDynamicallyQuantizableLinear, Kind.other),  # MultiheadAttention's own
        (nn.Linear, Kind.linear),
        (Conv1D, Kind.conv1d),
        (nn.Embedding, Kind.embedding),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Kind.kernel),
        (nn.MultiheadAttention, Kind.other),
    )
    kind = next((kind for cls, kind in sorts if isinstance(module, cls)), Kind.parameter)
    if kind is Kind.kernel and module.groups > 1:
        return Kind.other
    if stacks and kind is Kind.linear and path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS:
        return Kind.parameter
    if kind in (Kind.linear, Kind.embedding) and not hasattr(module, "embed_scale"):
        # A forward of its own (a router that answers with two tensors, positions by a mask) is not PEFT's.
        return kind if type(module).forward in (nn.Linear.forward, nn.Embedding.forward) else Kind.parameter
    return kind


def _ends(kind: Kind, shared: Sequence[str], kinds: Mapping[str, Kind]) -> bool:
    """Whether these are embeddings and the one head that shares them, which PEFT keeps as one."""
    others = [kinds[other.rpartition(".")[0]] for other in shared]
    return len(others) == 1 and {kind, *others} == {Kind.embedding, Kind.linear}


def _owner(name: str, heads: Sequence[str]) -> tuple[str, str]:
    """The module that PEFT would save for a parameter, and its name within: heads of a task are one."""
    if _PARAMETRIZED in name:
        owner, _, inner = name.partition(_PARAMETRIZED)
        return owner, f"{_PARAMETRIZED[1:]}{inner}"
    parts = name.split(".")
    depth = next((n for n, part in enumerate(parts, 1) if part in heads), len(parts) - 1)
    return ".".join(parts[:depth]), ".".join(parts[depth:])


def guessed(name: str, shape: tuple[int, ...], model_type: str | None) -> Place:
    """The same of a weight in a file, by its name and shape."""
    module, _, parameter = name.rpartition(".")
    if len(shape) < 2:
        kind = Kind.other
    elif parameter != "weight" or _ROUTER.fullmatch(module):
        kind = Kind.parameter
    elif len(shape) > 2:
        kind = Kind.kernel
    elif _EMBEDDING.fullmatch(module):
        kind = Kind.embedding
    else:
        kind = Kind.conv1d if is_conv1d(model_type, name, shape) else Kind.linear
    return Place(module, parameter, kind, shape, turns_experts(model_type))
