"""What a model in memory calls the parameters of a checkpoint, and which sort of layer each belongs to.

PEFT finds modules by their names in memory, so an adapter has to speak those. transformers builds the
model without weights; where it does not know it, names of files and shapes have to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.ground.canonical_names import canonical

_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|wpe|word_embeddings|tok_embeddings|embed_in)")
_CONV1D = re.compile(r".*\.(c_attn|q_attn|c_proj|c_fc)")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_sw3"})
_ROUTER = re.compile(r".*\.(gate|router|wg)")
_TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


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


@dataclass(frozen=True)
class Model:
    """A model's parameters by their canonical names, and the names of all of its modules."""

    places: Mapping[str, Place]
    modules: tuple[str, ...]


def in_memory(config: Mapping[str, Any]) -> Model | None:
    """The model that transformers makes of this config.json, without weights; None where it cannot."""
    model = empty_model(config)
    if model is None:
        return None
    places = {canonical(f"{p.module}.{p.parameter}"): p for p in _places(model)}
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
    import torch
    from transformers.pytorch_utils import Conv1D

    sorts = (
        (torch.nn.modules.linear.NonDynamicallyQuantizableLinear, Kind.other),  # MultiheadAttention's own
        (torch.nn.Linear, Kind.linear),
        (Conv1D, Kind.conv1d),
        (torch.nn.Embedding, Kind.embedding),
        ((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), Kind.kernel),
        (torch.nn.MultiheadAttention, Kind.other),
    )
    for path, module in model.named_modules():
        kind = next((kind for cls, kind in sorts if isinstance(module, cls)), Kind.parameter)
        if kind is Kind.kernel and module.groups > 1:
            kind = Kind.other
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            own = kind if len(shape) >= 2 and (kind is Kind.parameter or name == "weight") else Kind.other
            yield Place(path, name, own, shape, bool(getattr(module, "is_transposed", False)))


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
        is_conv1d = model_type in _CONV1D_MODELS and _CONV1D.fullmatch(module)
        kind = Kind.conv1d if is_conv1d else Kind.linear
    return Place(module, parameter, kind, shape, model_type in _TRANSPOSED)
