"""Changes that are told by value: whole parameters, rows of tokens, vectors that scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.formulas.module import Change, Module, Parameter, Rows, instead, rows_of

if TYPE_CHECKING:
    from torch import Tensor


def saved(module: Module, W: Parameter) -> Change:
    """The tensor of the file instead of the base's: modules_to_save, trained biases, norms of LN tuning."""
    return instead(held(module), W.rows)


def held(module: Module) -> Rows:
    """Rows of the one tensor of a module that is saved whole, float64."""
    [name] = module.keys
    shape = module.shape(name)
    if len(shape) == 2:
        return module.rows(name)
    return rows_of(module[name].reshape(shape[0] if len(shape) > 2 else 1, -1))


def tokens(module: Module, W: Parameter) -> Change:
    """Some rows of an embedding are the file's; the config lists them, for each embedding or for all."""
    trained = module["trainable_tokens_delta"]
    at = {row: number for number, row in enumerate(_indices(module))}

    def value(start: int, stop: int) -> Tensor:
        rows = W.rows(start, stop).clone()
        for row in range(start, stop):
            if row in at:
                rows[row - start] = trained[at[row]]
        return rows

    return instead(value, W.rows)


def _indices(module: Module) -> list[int]:
    told: Any = module.config.get("token_indices") or module.config.get("trainable_token_indices")
    if not isinstance(told, Mapping):
        return list(told)
    own = [rows for name, rows in told.items() if f".{module.name}".endswith(f".{name}")]
    return list((own or [*told.values()])[0])


def ia3(module: Module, W: Parameter) -> Change:
    """W * l, l over outputs, or over inputs in a feedforward module (arXiv:2205.05638).

    A grouped kernel (out, in / groups, *k) holds the inputs of each group in its rows.
    """
    import torch

    vector = module["ia3_l"].flatten()
    if len(W.dims) == 1:
        factors = vector.view(1, -1)
    elif is_feedforward(module.name, module.config):
        factors = vector.repeat_interleave(prod(W.dims[2:])).view(-1, W.shape[1])
    else:
        factors = vector.view(-1, 1)
    each = W.shape[0] // len(factors)  # rows that one row of factors is for

    def rows(start: int, stop: int) -> Tensor:
        return W.rows(start, stop) * (factors[torch.arange(start, stop) // each] - 1)

    return Change(rows)


def is_feedforward(module: str, config: Mapping[str, Any]) -> bool:
    """Whether feedforward_modules names it: a pattern for all of the name, or endings, dot or not."""
    named = config["feedforward_modules"]
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return module.endswith(tuple(named))
