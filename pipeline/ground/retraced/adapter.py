"""An adapter folder opened with the safetensors library, and what its modules do to which weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.ground.formulas import low_rank, values
from pipeline.ground.formulas.module import Formula, Module
from pipeline.ground.retraced.keys import Trained, read
from pipeline.ground.retraced.weights import Features, Place, Weights

# Of a module's tensors those whose sizes tell its features, and along which dimension.
_OUTPUTS = (("lora_B", 0), ("hira_B", 0), ("delora_B", 0), ("vera_lambda_b", 0), ("hada_w1_a", 0))
_INPUTS = (("lora_A", 1), ("hira_A", 1), ("delora_A", 1), ("hada_w1_b", 1), ("hra_u", 0))
# The order in which experts modules declare what target_parameters can mean; PEFT wraps the first innermost.
_DECLARED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


@dataclass(frozen=True)
class Told:
    """What the request says of an adapter's files because they do not."""

    expert_major: bool = False
    out_proj_times: int = 1


@dataclass(frozen=True)
class Piece:
    """A module's change, or a block of it, on a place of a weight; `times` it counts."""

    module: Module
    formula: Formula
    place: Place
    times: float

    @property
    def is_saved(self) -> bool:
        """Whether the file holds the parameter itself."""
        return self.formula is values.saved


@dataclass(frozen=True)
class Adapter:
    """One folder: what its file is opened as, its config, and what its keys are for."""

    file: Any
    config: Mapping[str, Any]
    trained: Sequence[Trained]
    shared: Mapping[str, str]
    times: float = 1.0
    told: Told = Told()
    model_type: str | None = None  # of the base

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(key).get_shape())

    def saved(self, weights: Weights) -> Iterator[Piece]:
        """What it holds whole; what no weight answers to stands under the module's own name."""
        for one in self.trained:
            if one.is_saved:
                shape = self.shape(one.keys[""])
                own = Place(f"{one.module}.{one.parameter}", shape, (0, shape[0] if len(shape) > 1 else 1))
                for place in weights.find(one.module, one.parameter) or [own]:
                    yield self._piece(one, place)

    def changes(self, weights: Weights) -> tuple[list[Piece], list[str]]:
        """All else, and the modules that no weight answers to; IA3 scales a bias only where there is one."""
        every = [(one, [*self._places(one, weights)]) for one in self.trained if not one.is_saved]
        found = [pair for _, pairs in every for pair in pairs]
        matrices = [p.matrix[::-1] if p.turned else p.matrix for one, p in found if one.parameter == "weight"]
        largest = (max(m[0] for m in matrices), max(m[1] for m in matrices)) if matrices else (0, 0)
        homeless = [one.module for one, pairs in every if not pairs and one.formula is not values.ia3]
        return [self._piece(one, place, largest) for one, place in found], homeless

    def _piece(self, one: Trained, place: Place, largest: tuple[int, int] = (0, 0)) -> Piece:
        module = Module(
            one.named,
            self.config,
            self.file,
            one.keys,
            self.shared,
            largest,
            self.told.expert_major,
            self.model_type,
        )
        times = self.times * (self.told.out_proj_times if one.inner else 1)
        return Piece(module, one.formula, place, times)

    def _places(self, one: Trained, weights: Weights) -> Iterator[tuple[Trained, Place]]:
        """With what it is on the parameter that it means."""
        if one.formula is values.tokens:
            yield from ((one, place) for place in weights.find(one.module, one.parameter))
            return
        if one.parameter == "weight":
            one = self._on_parameter(one, weights)
        stack = one.formula is low_rank.experts
        features = None if stack or one.parameter == "bias" else self._features(one)
        places = weights.find(one.module, one.parameter, features, stack)
        if not places and one.parameter == "weight":  # a MultiheadAttention's q, k and v
            places = weights.find(one.module, "in_proj_weight", features)
        yield from ((one, place) for place in places)

    def _on_parameter(self, one: Trained, weights: Weights) -> Trained:
        """By its right name what target_parameters means, whose modules are called after what holds it."""
        targets = {tuple(t.rpartition(".")[::2]) for t in self.config.get("target_parameters") or []}
        has_weight = bool(weights.find(one.module, "weight"))
        meant = {
            parameter
            for path, parameter in targets
            if (f".{one.module}".endswith(f".{path}") if path else not has_weight)
        }
        if not meant or one.formula is not low_rank.lora:
            return one
        declared = sorted(meant, key=lambda name: _DECLARED.index(name) if name in _DECLARED else 0)
        parameter = declared[-1 - one.depth]
        return replace(
            one, parameter=parameter, formula=low_rank.experts, named=f"{one.module}.{parameter}", inner=False
        )

    def _features(self, one: Trained) -> Features:
        """(out, in), None where no tensor tells."""
        outputs, inputs = (
            next((self.shape(one.keys[name])[axis] for name, axis in told if name in one.keys), None)
            for told in (_OUTPUTS, _INPUTS)
        )
        return outputs, inputs


@contextmanager
def opened(folder: Path, times: float, told: Told, model_type: str | None) -> Iterator[Adapter]:
    """The adapter of a folder; its change counts `times`."""
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        trained, shared = read(file.keys(), config)
        yield Adapter(file, config, trained, shared, times, told, model_type)
