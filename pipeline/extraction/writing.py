"""The extracted adapter as PEFT has it: adapter_config.json with exact paths, adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.extraction.decomposing import Decomposed
from pipeline.extraction.tensors import Content, Layout, last_of, tensors
from pipeline.ground.adapter_format import CONFIG, WEIGHTS
from pipeline.ground.base_modules import prefixes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import Refused
from pipeline.ground.files import write_all
from pipeline.ground.manifest import library_version, write_json
from pipeline.ground.model_modules import TASK_HEADS, TASKS, Kind
from pipeline.ground.shards import lay_out
from pipeline.ground.spool import Spool

if TYPE_CHECKING:
    from torch import Tensor

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "CAUSAL_LM"),
    *TASKS.items(),
)


def config(content: Content, layout: Layout, copies: bool = True) -> dict[str, Any]:
    """adapter_config.json; without `copies` that of a plan, which lists no copy for lm_head."""
    head, modules = layout.head or "", _saved(content)
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
                layout.shares(p) and last_of(p) != "embed_tokens" and p.module in names for p in content.all
            ):
                names.append(head)
    if any(_is_ending(target, layout.modules) for target in targets):
        targets = "|".join(re.escape(target) for target in targets)
    return {
        "peft_type": "LORA",
        "peft_version": library_version("peft") or "0.21.2",
        "task_type": _task(modules, layout),
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
    held = sorted(tensors(content, layout, decomposed, spool), key=lambda t: t.key)
    header, slots = lay_out([(t.key, t.dtype, t.shape) for t in held], {"format": "pt"})
    parts = {t.key: t.parts for t in held}
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


def _saved(content: Content) -> list[str]:
    """The modules saved whole, without those that are within another."""
    modules = dict.fromkeys(p.module for p in content.chosen.saved)
    return [name for name in modules if not any(above in modules for above in list(prefixes(name))[:-1])]


def _task(modules: Sequence[str], layout: Layout) -> str | None:
    """PEFT's task_type; None for one whose head it would look for, where that is not saved."""
    names = layout.architectures[:1]
    task = next((task for ending, task in _TASKS if any(name.endswith(ending) for name in names)), None)
    heads = TASK_HEADS.get(task or "", ())
    return None if any(m.endswith(heads) and m not in modules for m in layout.modules) else task


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _is_ending(name: str, modules: Sequence[str]) -> bool:
    return any(module.endswith(f".{name}") for module in modules)


def _pattern(name: str, modules: Sequence[str]) -> str:
    """The name as PEFT's patterns take it: any ending will do, so where that is unclear it is anchored."""
    return f"^{re.escape(name)}" if _is_ending(name, modules) else name


def _check_endings(saved: Iterable[str], modules: Sequence[str]) -> None:
    kept = set(saved)
    for name in kept:
        others = [m for m in modules if m.endswith(name) and not kept.intersection(prefixes(m))]
        if others:
            raise Refused(
                f"saved_modules: PEFT would take '{name}' for {others[0]} too, whose name ends so "
                f"({len(others)} modules)"
            )
