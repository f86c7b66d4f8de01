"""The extracted adapter as PEFT has it: adapter_config.json with exact paths, adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.extraction.choice import Chosen
from pipeline.extraction.decomposing import Decomposed
from pipeline.extraction.parameters import Parameter
from pipeline.ground.adapter_format import CONFIG, PREFIX, WEIGHTS
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import Refused
from pipeline.ground.files import write_all
from pipeline.ground.manifest import library_version, write_json
from pipeline.ground.model_modules import Kind
from pipeline.ground.ranks import by_pattern
from pipeline.ground.shards import lay_out
from pipeline.ground.spool import Spool
from pipeline.tying import EMBEDDINGS, HEADS

if TYPE_CHECKING:
    from torch import Tensor

_DECLARED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


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
    tied: bool = False  # lm_head shares the embeddings

    def shares(self, parameter: Parameter) -> bool:
        """Whether it is the embeddings that lm_head shares; PEFT wants a copy for each side."""
        return self.tied and _last(parameter) in EMBEDDINGS and parameter.place.kind is Kind.embedding

    def alpha_of(self, parameter: Parameter, rank: int) -> float:
        """The alpha of a parameter; its rank, and so a scale of 1, where the recipe does not say."""
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


class _Tensor(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]  # in the order of its bytes


def config(content: Content, layout: Layout, copies: bool = True) -> dict[str, Any]:
    """adapter_config.json; without `copies` that of a plan, which lists no copy for lm_head."""
    head, modules = _head(layout), _without_repeats(p.module for p in content.chosen.saved)
    layers = [p for p, _ in content.lora if p.place.kind is not Kind.parameter]
    top = max(content.ranks.values(), default=1)
    alphas = {p.rank_name: layout.alpha_of(p, rank) for p, rank in content.lora}
    main = layout.alpha
    if main is None:  # that of the modules with the highest rank
        main = next((alphas[name] for name, rank in content.ranks.items() if rank == top), float(top))
    ranks = {name: rank for name, rank in content.ranks.items() if rank != top}
    strange = {name: alpha for name, alpha in alphas.items() if alpha != main}
    tied = any(layout.shares(p) for p in (*layers, *content.chosen.saved))
    if tied:
        tables: list[dict[str, Any]] = [ranks, strange]
        for table in tables:
            for shared in filter(layout.shares, layers):
                if shared.rank_name in table:
                    table[head] = table[shared.rank_name]
    _check_endings(modules, layout.modules)
    targets: Any = [p.module for p in layers]
    if tied and copies:  # PEFT looks for these two names alone, and then ties what the model ties
        for names in (modules, targets):
            if any(
                layout.shares(p) and _last(p) != "embed_tokens" and p.module in names for p in content.all
            ):
                names.append(head)
    if any(_is_ending(target, layout.modules) for target in targets):
        targets = "|".join(re.escape(target) for target in targets)
    return {
        "peft_type": "LORA",
        "peft_version": library_version("peft") or "0.21.2",
        "task_type": next((t for e, t in _TASKS for a in layout.architectures[:1] if a.endswith(e)), None),
        "base_model_name_or_path": layout.trained_on,
        "revision": layout.revision,
        "inference_mode": True,
        "r": top,
        "lora_alpha": _plain(main),
        "rank_pattern": {_pattern(name, layout.modules): rank for name, rank in ranks.items()},
        "alpha_pattern": {_pattern(name, layout.modules): _plain(a) for name, a in strange.items()},
        "use_rslora": layout.rslora,
        "target_modules": targets if targets else ([] if modules or not content.lora else None),
        "target_parameters": [p.name for p, _ in content.lora if p.place.kind is Kind.parameter] or None,
        "modules_to_save": modules or None,
        "bias": "lora_only" if content.chosen.biases else "none",
        "fan_in_fan_out": bool(layers) and all(p.place.kind is Kind.conv1d for p in layers),
        "ensure_weight_tying": tied,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "lora_bias": False,
    }


def write(
    folder: Path,
    content: Content,
    layout: Layout,
    decomposed: Mapping[str, Sequence[Decomposed]],
    spool: Spool,
) -> None:
    """Writes both files; the config last, so that no half adapter passes for one."""
    folder.mkdir(parents=True)
    tensors = sorted(_tensors(content, layout, decomposed, spool), key=lambda t: t.key)
    header, slots = lay_out([(t.key, t.dtype, t.shape) for t in tensors], {"format": "pt"})
    parts = {t.key: t.parts for t in tensors}
    with (folder / WEIGHTS).open("wb") as file:
        write_all(file.fileno(), 0, memoryview(header))
        for slot in slots:
            at = slot.offset
            for part in parts[slot.name]():
                at += _put(file.fileno(), at, part, slot.dtype)
            assert at == slot.offset + slot.length, slot.name
    write_json(folder / CONFIG, config(content, layout))


def _put(descriptor: int, at: int, part: Tensor, dtype: str) -> int:
    import torch

    stored = part.to(torch_dtype(dtype)).contiguous().cpu().view(-1).view(torch.uint8).numpy()
    write_all(descriptor, at, memoryview(stored))
    return len(stored)


def num_parameters(parameter: Parameter, rank: int) -> int:
    """Elements of its factors."""
    return rank * sum(parameter.matrix) * len(parameter.matrices)


def _tensors(
    content: Content, layout: Layout, decomposed: Mapping[str, Sequence[Decomposed]], spool: Spool
) -> Iterator[_Tensor]:
    nested: defaultdict[str, list[str]] = defaultdict(list)
    for p, _ in content.lora:
        if p.place.kind is Kind.parameter:
            nested[p.module].append(p.place.parameter)
    for p, rank in content.lora:
        around = nested[p.module] if p.place.kind is Kind.parameter else []
        inner = sorted(around, key=lambda name: _DECLARED.index(name) if name in _DECLARED else 0)
        depth = len(inner) - 1 - inner.index(p.place.parameter) if inner else 0
        key = PREFIX + p.module + ".base_layer" * depth
        scale = layout.scale(p, rank)
        yield from _factors(key, p, rank, scale, layout, decomposed[p.name], spool)
    for p in content.chosen.biases:
        yield _whole(f"{PREFIX}{p.module}.base_layer.{p.place.parameter}", p)
    for p in content.chosen.saved:
        yield _whole(PREFIX + p.name, p)
        if layout.shares(p):
            yield _whole(f"{PREFIX}{_head(layout)}.{p.place.parameter}", p)


def _factors(
    key: str,
    p: Parameter,
    rank: int,
    scale: float,
    layout: Layout,
    matrices: Sequence[Decomposed],
    spool: Spool,
) -> Iterator[_Tensor]:
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
        yield _Tensor(f"{key}.lora_embedding_A", dtype, (rank, m), left)
        yield _Tensor(f"{key}.lora_embedding_B", dtype, (n, rank), turned(right))
        if layout.shares(p):
            head = PREFIX + _head(layout)
            yield _Tensor(f"{head}.lora_A.weight", dtype, (rank, n), right)
            yield _Tensor(f"{head}.lora_B.weight", dtype, (m, rank), turned(left))
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

    yield _Tensor(f"{key}.lora_A.weight", dtype, A_shape, of_A)
    yield _Tensor(f"{key}.lora_B.weight", dtype, B_shape, stacked if len(matrices) > 1 else turned(of_B))


def _whole(key: str, p: Parameter) -> _Tensor:
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

    return _Tensor(key, dtype, p.shape, parts)


def saved_bytes(p: Parameter) -> int:
    """Bytes of a parameter that is saved whole."""
    from pipeline.ground.dtypes import num_bytes

    tensor = _whole("", p)
    return num_bytes(tensor.dtype, tensor.shape) or 0


def _last(parameter: Parameter) -> str:
    return parameter.module.rpartition(".")[2]


def _head(layout: Layout) -> str:
    return next((m for m in layout.modules if m.rpartition(".")[2] in HEADS), "lm_head")


def _without_repeats(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(modules))


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _is_ending(name: str, modules: Sequence[str]) -> bool:
    return any(module.endswith(f".{name}") for module in modules)


def _pattern(name: str, modules: Sequence[str]) -> str:
    """The name as PEFT's patterns take it: any ending will do, so where that is unclear it is anchored."""
    return f"^{re.escape(name)}" if _is_ending(name, modules) else name


def _check_endings(saved: Iterable[str], modules: Sequence[str]) -> None:
    for name in saved:
        others = [m for m in modules if m.endswith(name) and m != name]
        if others:
            raise Refused(
                f"saved_modules: PEFT would take '{name}' for {others[0]} too, whose name ends so "
                f"({len(others)} modules)"
            )
