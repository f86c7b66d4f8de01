"""Which weights of a 16-bit checkpoint a quantizer takes, told by names and shapes alone.

As transformers 5.23 does when it loads with such a config: the weights of linear layers (`nn.Linear`), which
are two-dimensional and called `weight`, but no embeddings, no output layer, no router, and no parameter of a
module of its own (norms, convolutions, 3-D experts). Experts that files hold one by one are linear layers
there and one 3-D parameter in memory: bitsandbytes leaves those alone, FP8 and compressed-tensors take them.

What is left although it might be a linear layer is written into the config as skipped; so a loader agrees
with the file where a name deceives: a router that is an `nn.Linear` after all stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EMBEDDING = re.compile(r"\w*embed\w*|wte|wpe|shared|relative_attention_bias|emb")
_OUTPUT = ("lm_head", "embed_out", "output_layer", "score", "classifier", "qa_outputs", "out_proj_head")
_ROUTER = ("gate", "router", "gating", "gate_inp", "wg")
_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..*")


def is_linear(name: str, shape: tuple[int, ...], *, experts: bool) -> bool:
    """Whether a weight is quantized; `experts`: whether those are that a file holds one by one."""
    *modules, last = name.split(".")
    if last != "weight" or len(shape) != 2 or not modules:
        return False
    if _EXPERT.fullmatch(name):
        return experts
    return not (_EMBEDDING.fullmatch(modules[-1]) or modules[-1] in (*_OUTPUT, *_ROUTER))


def left_out(weights: Iterable[tuple[str, tuple[int, ...]]], quantized: set[str]) -> list[str]:
    """Modules that are not quantized but might be taken for linear layers, or for experts; lm_head always.

    Embeddings are not among them, and of experts that a file holds one by one only their module.
    """
    modules = {"lm_head": None}
    for name, shape in weights:
        module, _, last = name.rpartition(".")
        if name in quantized or not module:
            continue
        if expert := _EXPERT.fullmatch(name):
            modules[f"{expert[1] or ''}experts"] = None
            continue
        plain = last == "weight" and len(shape) == 2 and not _EMBEDDING.fullmatch(module.split(".")[-1])
        if plain or (len(shape) == 3 and module.endswith("experts")):
            modules[module] = None
    return list(modules)


def endings(modules: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The modules by what their names end in behind the number of a layer, where that tells them apart."""
    taken = [name.removesuffix(".weight") for name in quantized]
    found: dict[str, None] = {}
    for module in modules:
        tail = re.split(r"\.\d+\.", module)[-1]
        found[module if any(name.endswith(tail) for name in taken) else tail] = None
    return list(found)
