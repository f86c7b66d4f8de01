"""What programs that serve adapters take of one, and what an adapter for them has to leave out.

vLLM (`vllm/lora/peft_helper.py`, `lora_model.py`, `config/lora.py`, read in source 2025 and 2026): pairs of
lora_A and lora_B on linear layers, and on embeddings of models that list them; modules_to_save, bias and
use_dora are refused. Of the config it reads r and lora_alpha alone, so that one scale holds for all modules
whatever rank_pattern and alpha_pattern say; r may not be above --max-lora-rank, which is one of a menu. Older
ones know no target_parameters.

llama.cpp (`convert_lora_to_gguf.py`, `src/llama-adapter.cpp`, read in source 2025 and 2026): the same pairs;
of whole tensors norms alone, by their names, which its loader then passes over. It scales each pair by
lora_alpha / the rank of that pair, and knows no rsLoRA. It has no place for a pair on an lm_head that shares
the embeddings, and turns a Conv1D weight once too often.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from math import sqrt
from typing import Any

from pipeline.extraction.choice import Chosen
from pipeline.extraction.differences import Change
from pipeline.extraction.parameters import Parameter
from pipeline.extraction.tensors import Layout
from pipeline.ground.errors import Refused
from pipeline.ground.model_modules import Kind
from pipeline.ground.report import Finding

Engine = Enum("Engine", {"peft": "PEFT", "vllm": "vLLM", "llama.cpp": "llama.cpp"})
"""Who is to load an adapter."""

LLAMA_CPP = Engine["llama.cpp"]
_MENU = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank
_NOT_TAKEN = {
    Kind.parameter: "no stacked experts and other bare parameters",
    Kind.kernel: "no convolutions",
    Kind.conv1d: "no Conv1D layers",
}


def check_for(
    engine: Engine,
    ranks: Sequence[Any],
    alpha_pattern: Mapping[str, float],
    rslora: bool,
    saved: Sequence[str] | None,
) -> None:
    """Refused, with every reason, for settings that the engine does not read or take."""
    name, wrong = engine.value, []
    if alpha_pattern and engine is not Engine.peft:
        wrong.append(f"alpha_pattern: {name} reads one alpha for all modules; leave it out")
    if rslora and engine is LLAMA_CPP:
        wrong.append(f"extract.rslora: {name} scales by alpha / rank; leave it out")
    if saved and engine is Engine.vllm:
        wrong.append(
            f"saved_modules: {name} takes no module saved whole; leave them out, or serve a merged model"
        )
    top = max((rank for rank in ranks if isinstance(rank, int)), default=1)
    if engine is Engine.vllm and top > _MENU[-1]:
        wrong.append(f"rank: {top} is more than {name} takes; give at most {_MENU[-1]}")
    if wrong:
        raise Refused(*wrong)


def menu_of(engine: Engine) -> tuple[int, ...]:
    """The ranks that an engine allots memory for; none where it takes any."""
    return _MENU if engine is Engine.vllm else ()


def scaled(layout: Layout, engine: Engine, top: int) -> Layout:
    """The layout with the scales that the engine will read, where `top` is the highest rank."""
    if engine is Engine.vllm:
        root = sqrt(top) if layout.rslora else float(top)
        return replace(layout, one_scale=1.0 if layout.alpha is None else layout.alpha / root)
    if engine is LLAMA_CPP:
        return replace(layout, alpha=float(top) if layout.alpha is None else layout.alpha)
    return layout


def fitted(
    chosen: Chosen,
    engine: Engine,
    layout: Layout,
    changes: Mapping[str, Change] | None,
    saved: Sequence[str] | None,
) -> Chosen:
    """What of it the engine takes, with findings that say what the rest is worth; `saved` was asked for."""
    if engine is Engine.peft:
        return chosen
    name = engine.value
    larger = next((p for p in chosen.saved if any(pair.resized for pair in p.pairs)), None)
    if larger:
        raise Refused(
            f"save.for: {name} takes no new tokens from an adapter, but {larger.name} has "
            f"{larger.shape[0]} rows, the base's {larger.pairs[0].base.shape[0]}; serve a merged model"
        )
    left: defaultdict[str, list[Parameter]] = defaultdict(list)
    lora: list[Parameter] = []
    for p in chosen.lora:
        reason = _NOT_TAKEN.get(p.place.kind)
        if layout.shares(p):
            reason = "no embeddings that lm_head shares"
        (left[reason] if reason else lora).append(p)
    whole = _norms(chosen.saved) if engine is LLAMA_CPP else []
    for p in chosen.saved:
        if p not in whole:
            if p.is_meant(saved or ()):
                raise Refused(f"saved_modules: {name} takes norms alone, not {p.module}; leave it out")
            left["no modules saved whole" if engine is Engine.vllm else "only norms saved whole"].append(p)
    left["no biases"] += chosen.biases
    findings = [
        Finding(f"left out, since {name} takes {reason}: {_worth(some, changes)}")
        for reason, some in left.items()
        if some
    ]
    if whole:
        findings.append(Finding(f"{name} carries norms, but does not apply them: {_worth(whole, changes)}"))
    outer = [p.module for p in lora if p.place.kind is Kind.embedding or p.module.endswith("lm_head")]
    if outer and engine is Engine.vllm:
        findings.append(Finding(f"vLLM takes {' and '.join(outer)} of most models, not of all"))
    if not lora:
        raise Refused(f"save.for: {name} takes nothing of what changed; serve a merged model")
    return Chosen(tuple(lora), tuple(whole), (), (*chosen.findings, *findings))


def _norms(saved: Sequence[Parameter]) -> list[Parameter]:
    """Of modules saved whole those whose every tensor is a norm's weight by its name."""
    strange = {p.module for p in saved if not _is_norm(p)}
    return [p for p in saved if p.module not in strange]


def _is_norm(p: Parameter) -> bool:
    named = "_layernorm" in p.module or p.module.rpartition(".")[2].startswith("norm")
    return named and p.place.parameter == "weight" and len(p.shape) == 1


def _worth(some: Sequence[Parameter], changes: Mapping[str, Change] | None) -> str:
    """How many there are, and their share of what changed."""
    told = some[0].name + (f" and {len(some) - 1} more" if len(some) > 1 else "")
    if changes is None:
        return told
    total = sum(change.energy for change in changes.values())
    names = {pair.name for p in some for pair in p.pairs}
    share = sum(changes[name].energy for name in names) / total if total else 0.0
    return f"{told}, {share:.2%} of the difference's energy"


def serving(engine: Engine, rank: int) -> str | None:
    """How an adapter of this highest rank is given to the engine, as a sentence without its full stop."""
    if engine is Engine.vllm:
        return f"vLLM serves it with --enable-lora --max-lora-rank {next(n for n in _MENU if n >= rank)}"
    if engine is LLAMA_CPP:
        return "llama.cpp's convert_lora_to_gguf.py, given the base by --base, makes the GGUF file of it"
    return None
