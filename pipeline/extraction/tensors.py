"""The tensors of an extracted adapter, by PEFT's keys: factors from the spool, and parameters saved whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from pipeline.extraction.choice import Chosen
from pipeline.extraction.decomposing import Decomposed
from pipeline.extraction.parameters import Parameter
from pipeline.ground.adapter_format import PREFIX
from pipeline.ground.deltas.lora_family import DECLARED
from pipeline.ground.dtypes import num_bytes
from pipeline.ground.model_modules import Kind
from pipeline.ground.ranks import by_pattern
from pipeline.ground.spool import Spool
from pipeline.merging.tying import EMBEDDINGS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How an adapter scales and stores its factors, and of which model it is."""

    alpha: float | None
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dtype: str
    trained_on: str | None
    revision: str | None
    architectures: Sequence[str]
    modules: Sequence[str] = ()  # of the model in memory
    head: str | None = None  # the module that shares the embeddings
    one_scale: float | None = None  # for all parameters, whatever their ranks

    def shares(self, parameter: Parameter) -> bool:
        """Whether it is the embeddings that a head shares; PEFT wants a copy for each side."""
        named = parameter.place.shared or (not self.modules and last_of(parameter) in EMBEDDINGS)
        return bool(self.head and named) and parameter.place.kind is Kind.embedding

    def alpha_of(self, parameter: Parameter, rank: int) -> float:
        """The alpha of a parameter; its rank, and so a scale of 1, where the recipe does not say."""
        if self.one_scale is not None:
            return self.one_scale * (sqrt(rank) if self.rslora else rank)
        own = by_pattern(parameter.rank_name, self.alpha_pattern)
        alpha = own if own is not None else self.alpha
        return alpha if alpha is not None else sqrt(rank) if self.rslora else float(rank)

    def scale(self, parameter: Parameter, rank: int) -> float:
        """What B @ A is multiplied with."""
        return self.alpha_of(parameter, rank) / (sqrt(rank) if self.rslora else float(rank))


@dataclass
class Content:
    """The parameters of an adapter, with their ranks."""

    lora: Sequence[tuple[Parameter, int]]
    chosen: Chosen
    ranks: dict[str, int] = field(init=False)
    all: list[Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.all = [*(parameter for parameter, _ in self.lora), *self.chosen.saved]
        self.ranks = {parameter.rank_name: rank for parameter, rank in self.lora}


class Held(NamedTuple):
    """A tensor of the file to be."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]  # in the order of its bytes


def num_parameters(parameter: Parameter, rank: int) -> int:
    """Elements of its factors."""
    return rank * sum(parameter.matrix) * len(parameter.matrices) * parameter.num_copies


def tensors(
    content: Content, layout: Layout, decomposed: Mapping[str, Sequence[Decomposed]], spool: Spool
) -> Iterator[Held]:
    """All of them."""
    nested: defaultdict[str, list[str]] = defaultdict(list)
    for p, _ in content.lora:
        if p.place.kind is Kind.parameter:
            nested[p.module].append(p.place.parameter)
    for p, rank in content.lora:
        around = nested[p.module] if p.place.kind is Kind.parameter else []
        inner = sorted(around, key=lambda name: DECLARED.index(name) if name in DECLARED else 0)
        depth = len(inner) - 1 - inner.index(p.place.parameter) if inner else 0
        key = PREFIX + p.module + ".base_layer" * depth
        scale = layout.scale(p, rank)
        yield from _factors(key, p, rank, scale, layout, decomposed[p.name], spool)
    for p in content.chosen.biases:
        yield _whole(f"{PREFIX}{p.module}.base_layer.{p.place.parameter}", p)
    for p in content.chosen.saved:
        yield _whole(PREFIX + p.name, p)
        if layout.shares(p):
            yield _whole(f"{PREFIX}{layout.head}.{p.place.parameter}", p)


def _factors(
    key: str,
    p: Parameter,
    rank: int,
    scale: float,
    layout: Layout,
    matrices: Sequence[Decomposed],
    spool: Spool,
) -> Iterator[Held]:
    """lora_A and lora_B of one parameter: L (rows, r) and R (r, columns), whichever is which."""
    m, n = p.matrix
    half = 1 / sqrt(abs(scale))

    def left() -> Iterator[Tensor]:  # L.T, matrix by matrix
        return (spool.first(d.left, rank) * half for d in matrices)

    def right() -> Iterator[Tensor]:
        return (spool.first(d.right, rank) * (half if scale > 0 else -half) for d in matrices)

    def turned(parts: Callable[[], Iterator[Tensor]]) -> Callable[[], Iterator[Tensor]]:
        return lambda: (part.T for part in parts())

    kind, dtype = p.place.kind, layout.dtype
    if kind is Kind.embedding:
        yield Held(f"{key}.lora_embedding_A", dtype, (rank, m), left)
        yield Held(f"{key}.lora_embedding_B", dtype, (n, rank), turned(right))
        if layout.shares(p):
            head = f"{PREFIX}{layout.head}"
            yield Held(f"{head}.lora_A.weight", dtype, (rank, n), right)
            yield Held(f"{head}.lora_B.weight", dtype, (m, rank), turned(left))
        return
    is_turned = kind is Kind.conv1d or (len(matrices) > 1 and p.place.is_transposed)
    of_A, of_B, inputs, outputs = (left, right, m, n) if is_turned else (right, left, n, m)
    A_shape: tuple[int, ...] = (rank * len(matrices), inputs)
    B_shape: tuple[int, ...] = (outputs, rank * len(matrices))
    if kind is Kind.kernel:
        A_shape, B_shape = (rank, *p.shape[1:]), (outputs, rank, *[1] * (len(p.shape) - 2))

    def stacked() -> Iterator[Tensor]:  # (o, r, experts), the expert fastest
        import torch

        yield torch.stack(list(of_B()), dim=-1).permute(1, 0, 2)

    yield Held(f"{key}.lora_A.weight", dtype, A_shape, of_A)
    yield Held(f"{key}.lora_B.weight", dtype, B_shape, stacked if len(matrices) > 1 else turned(of_B))


def _whole(key: str, p: Parameter) -> Held:
    """A parameter as the fine-tune has it, in the dtype of its file; codes in float32."""
    weights = [(s.pair.tuned, s.start, s.stop) for slices in p.matrices for s in slices]
    plain = all(weight.source is not None for weight, _, _ in weights)
    dtype = weights[0][0].dtype if plain else "F32"

    def parts() -> Iterator[Tensor]:
        for slices in p.matrices:
            for s in slices:
                with s.pair.tuned.open("cpu") as tiles:
                    for start, stop in s.pair.grid(s.start, s.stop):
                        low, high = max(start, s.start), min(stop, s.stop)
                        yield tiles(start, stop).value[low - start : high - start]

    return Held(key, dtype, p.shape, parts)


def saved_bytes(p: Parameter) -> int:
    """Bytes of a parameter that is saved whole."""
    tensor = _whole("", p)
    return (num_bytes(tensor.dtype, tensor.shape) or 0) * p.num_copies


def last_of(parameter: Parameter) -> str:
    """The last name of its module."""
    return parameter.module.rpartition(".")[2]
