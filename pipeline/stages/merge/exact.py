"""merge=exact: W + weight * delta in merge_dtype, left to be rounded once by whoever saves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.dtypes import DENSE_FLOATS, FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.names import nearest, weight_names
from pipeline.stage import Merge, stage
from pipeline.weight import Adapter, Checkpoint, Merged, Placed, Weight

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_sw3"})


@stage("exact")
@dataclass(frozen=True, kw_only=True)
class Exact(Merge):
    """Base plus adapter, each weight rounded once."""

    weight: float = 1.0
    """factor on the adapter; negative subtracts it"""

    def check(self) -> None:
        if self.weight == 0 or self.weight != self.weight or abs(self.weight) == float("inf"):
            raise Refused(
                f"merge.weight: {self.weight} would merge nothing; give a finite factor other than 0"
            )

    def __call__(self, base: Checkpoint[Weight], adapter: Adapter) -> Checkpoint[Weight]:
        bound = bind(base, adapter, self.names)
        return replace(
            base,
            weights=tuple(
                merged(weight, Placed(bound[weight.name], self.weight), arithmetic=self.merge_dtype)
                if weight.name in bound
                else weight
                for weight in base.weights
            ),
        )


def merged(weight: Weight, *placed: Placed, arithmetic: FloatDtype) -> Merged:
    """The weight with these deltas; a float64 weight is never computed in less."""
    dtype = "F64" if weight.dtype == "F64" else arithmetic.value
    return Merged(weight.name, weight.shape, weight.dtype, weight, placed, dtype)


def bind(base: Checkpoint[Weight], adapter: Adapter, renames: Mapping[str, str]) -> dict[str, Delta]:
    """Every delta of the adapter by the name of the weight it changes; Refused if one fits none."""
    weights = {weight.name: weight for weight in base.weights}
    names = weight_names(((m, d.parameter) for m, d in adapter.deltas.items()), renames)
    bound: dict[str, Delta] = {}
    wrong: list[str] = []
    missing: list[str] = []
    for old in renames:
        if not any(module == old or module.startswith(f"{old}.") for module in adapter.deltas):
            wrong.append(f"names: no module of the adapter is '{old}' or begins with '{old}.'")
    for module, delta in adapter.deltas.items():
        name = names[module]
        if name not in weights:
            missing.append(name)
        elif name in bound:
            wrong.append(f"adapter: both '{bound[name].module}' and '{module}' mean {name}; check names=")
        elif reason := _misfit(weights[name], delta):
            wrong.append(f"adapter: '{module}' {reason}")
        else:
            bound[name] = delta
    if missing:
        wrong.append(_unknown_weights(missing, base, weights))
    if bound:
        wrong += _ambiguous(base, weights, bound)
    if wrong:
        raise Refused(*wrong)
    return bound


def _misfit(weight: Weight, delta: Delta) -> str | None:
    if weight.shape != delta.shape:
        return f"was made for a weight {list(delta.shape)}, but {weight.name} is {list(weight.shape)}"
    if weight.dtype not in DENSE_FLOATS:
        return f"means {weight.name}, which is stored as {weight.dtype}; this version cannot decode it"
    return None


def _unknown_weights(missing: list[str], base: Checkpoint[Weight], weights: Mapping[str, Weight]) -> str:
    if missing == ["lm_head.weight"] and base.config.tied is not False:
        return (
            "adapter: changes lm_head, but the base shares lm_head with its embeddings "
            "(tie_word_embeddings), so it has no weight of its own; this version cannot untie it"
        )
    return (
        f"adapter: no weight {missing[0]} in {base.origin.asked}{nearest(missing[0], weights)} "
        f"({len(missing)} of its modules match nothing; names={{from: to}} renames modules)"
    )


def _ambiguous(
    base: Checkpoint[Weight], weights: Mapping[str, Weight], bound: Mapping[str, Delta]
) -> list[str]:
    """Targets whose shape fits but whose meaning does not: square Conv1D weights, a tied lm_head."""
    model_type = base.config.model_type
    if model_type in _CONV1D_MODELS:
        return [
            f"base_model: is a {model_type}, whose Conv1D weights lie transposed; "
            "this version cannot merge it"
        ]
    if any(name.endswith("lm_head.weight") for name in bound) and base.config.tied:
        return [
            "adapter: changes lm_head, which the base's config ties to its embeddings "
            "(tie_word_embeddings); this version cannot untie it"
        ]
    return []
