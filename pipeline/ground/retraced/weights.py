"""Where in a checkpoint a module's parameter lies: names of all eras, experts together or one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from pipeline.ground.names import is_conv1d

Features = tuple[int | None, int | None]  # (out, in) of a module, as far as its tensors tell
Shape = tuple[int, ...]

_HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, the first rows and the others
_ONE = re.compile(r"(.*)\.experts\.(\d+)\.(gate_up_proj|gate_proj|up_proj|down_proj)\.(weight|bias)")
_ALL = re.compile(r"(.*)\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?")
_IN_OUT = frozenset({"gpt_oss", "aria", "aria_text", "llama4", "llama4_text"})  # experts lie (e, in, out)

# What eras of transformers called the same thing; the later name is taken. `models/*/modeling_*.py`.
_LATER = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embed_out\.", "lm_head."),
        (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
        (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
        (r"(vision_tower|vision_model|image_tower)\.vision_model\.", r"\1."),
        (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
        (r"\.attention\.(?:attention|self)\.(?:(q)uery|(k)ey|(v)alue)\.", r".attention.\1\2\3_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.(\d+)\.intermediate\.dense\.", r".\1.mlp.fc1."),
        (r"\.(\d+)\.output\.dense\.", r".\1.mlp.fc2."),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
        (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
        (r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),
        (r"\.mlp\.router\.(?:layer\.|gate\.)?(weight|bias)$", r".mlp.gate.\1"),
        (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
        (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
        (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
        (r"\.experts\.(gate_up|down)_projs\.(\d+)\.", r".experts.\2.\1_proj."),
    )
)
# What models call themselves within a class with a head: files of the model alone lack it.
_INNER = frozenset(
    {"albert", "backbone", "beit", "bert", "convbert", "deberta", "deit", "dinov2", "distilbert", "electra"}
    | {"esm", "gpt_neox", "hubert", "layoutlm", "longformer", "mpnet", "roberta", "swin", "transformer"}
    | {"vit", "wav2vec2", "wavlm"}
)
_NESTING = frozenset({"model", "language_model"})  # before the layers: how deep a class holds them


def spelt(name: str) -> str:
    """The name in the latest spelling, without the words before its first number that only nest."""
    words = name.split(".")
    first = next((at for at, word in enumerate(words) if word.isdigit()), len(words) - 1)
    name = ".".join([*(word for word in words[:first] if word not in _NESTING), *words[first:]])
    for pattern, later in _LATER:
        name = pattern.sub(later, name)
    return name


@dataclass(frozen=True)
class Place:
    """Rows of a parameter, as it lies, and the place (row, column) of a weight's matrix where they lie.

    `dims` are the parameter's as it lies; `turned` if the module means its transpose. A weight's matrix has
    its last dimension as columns; a parameter's its first as rows, of a `stack` the first two.
    """

    weight: str
    dims: Shape
    rows: tuple[int, int]
    row: int = 0
    column: int = 0
    turned: bool = False
    stack: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the parameter as it lies."""
        height = 1 if len(self.dims) < 2 else prod(self.dims[: 2 if self.stack else 1])
        return height, prod(self.dims) // max(height, 1)


class Weights:
    """The shapes of a checkpoint's weights, asked by the names that adapters have for them."""

    def __init__(self, shapes: dict[str, Shape], model_type: str | None, renames: Mapping[str, str]) -> None:
        self.shapes, self._model_type, self._renames = shapes, model_type, renames
        self._by_spelling: dict[str, list[str]] = {}
        for name in shapes:
            self._by_spelling.setdefault(spelt(name), []).append(name)
        self._inner = sorted(_INNER & {name.split(".")[0] for name in self._by_spelling})
        self._stacks = {_stack(name) for name in self._by_spelling}

    def find(
        self, module: str, parameter: str, features: Features | None = None, stack: bool = False
    ) -> list[Place]:
        """All places of the parameter, none if no weight answers to it or two do.

        Without `features` it lies as the module means it.
        """
        asked = ".".join(filter(None, (self._renamed(module), parameter)))
        if asked in self.shapes:
            return [self._all_of(asked, features, stack)]
        asked = spelt(asked)
        for names in ([asked], self._nested_otherwise(asked)):
            if answers := [places for name in names for places in self._answers(name, features, stack)]:
                return answers[0] if len(answers) == 1 else []
        return []

    def _renamed(self, module: str) -> str:
        for old, new in self._renames.items():
            if f"{module}.".startswith(f"{old}."):
                return new + module[len(old) :]
        return module

    def _nested_otherwise(self, asked: str) -> list[str]:
        """The name without that of the model within a class, or with it."""
        if _stack(asked) in self._stacks:
            return []  # layers that the checkpoint knows by this very name
        front, _, rest = asked.partition(".")
        return [rest] if front in _INNER else [f"{inner}.{asked}" for inner in self._inner]

    def _answers(self, asked: str, features: Features | None, stack: bool) -> Iterator[list[Place]]:
        for name in self._by_spelling.get(asked, ()):
            yield [self._all_of(name, features, stack)]
        if one := _ONE.fullmatch(asked):
            yield from self._in_a_stack(one[1], int(one[2]), one[3], one[4] == "bias", features)
        elif (every := _ALL.fullmatch(asked)) and not every[3]:
            yield from self._one_by_one(every[1], every[2])

    def _all_of(self, name: str, features: Features | None, stack: bool) -> Place:
        shape = self.shapes[name]
        rows = prod(shape[:2]) if stack and len(shape) == 3 else shape[0] if len(shape) > 1 else 1
        turned = len(shape) == 2 and features is not None and self._is_turned(name, shape, features)
        return Place(name, shape, (0, rows), turned=turned, stack=stack and len(shape) == 3)

    def _is_turned(self, name: str, shape: Shape, features: Features) -> bool:
        if is_conv1d(self._model_type, name, shape):
            return True
        return features[0] not in (None, shape[0]) and _fits(features, shape[::-1])

    def _in_a_stack(
        self, path: str, expert: int, projection: str, bias: bool, features: Features | None
    ) -> Iterator[list[Place]]:
        """One expert's projection within the weight of all; gate and up may be halves of one there."""
        whole = [(projection, 0, 1)]
        if projection in _HALVES:
            whole.append(("gate_up_proj", _HALVES.index(projection), 2))
        for fused, part, parts in whole:
            for name in self._by_spelling.get(f"{path}.experts.{fused}" + "_bias" * bias, ()):
                if expert < self.shapes[name][0]:
                    yield [self._matrix(name, expert, part, parts, features or (None, None))]

    def _matrix(self, name: str, expert: int, part: int, parts: int, features: Features) -> Place:
        if len(self.shapes[name]) == 2:
            width = self.shapes[name][1] // parts
            return Place(name, (width,), (0, 1), expert, part * width)
        _, height, width = self.shapes[name]
        straight, lying = (height // parts, width), (width // parts, height)
        turned = not _fits(features, straight)
        if not turned and _fits(features, lying):
            turned = self._model_type in _IN_OUT
        if turned:
            dims, row, column = (height, lying[0]), expert * height, part * lying[0]
        else:
            dims, row, column = straight, expert * height + part * straight[0], 0
        return Place(name, dims, (0, dims[0]), row, column, turned)

    def _one_by_one(self, path: str, projection: str) -> Iterator[list[Place]]:
        """All experts' projection over weights of their own; gate and up may be apart there."""
        for parts in ([projection], _HALVES if projection == "gate_up_proj" else ()):
            names = [self._experts(path, part) for part in parts]
            if not names or not all(names):
                continue
            rows, columns = self.shapes[names[0][0]]
            dims = (len(names[0]), rows * len(parts), columns)
            yield [
                Place(name, dims, (first, first + rows), stack=True)
                for number, own in enumerate(names)
                for expert, name in enumerate(own)
                for first in [(expert * len(parts) + number) * rows]
            ]

    def _experts(self, path: str, projection: str) -> list[str]:
        """The weights of experts 0, 1, 2 ..., as many as there are."""
        found: list[str] = []
        while own := self._by_spelling.get(f"{path}.experts.{len(found)}.{projection}.weight"):
            found.append(own[0])
        return found


def _stack(name: str) -> str:
    """What stands before the first number; all of a name that has none."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0]


def _fits(features: Features, shape: Shape) -> bool:
    return all(told in (None, size) for told, size in zip(features, shape, strict=True))
