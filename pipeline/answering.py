"""The model's answers: base + unmerged adapter against the merged folder, where both can be run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.combined import Combined
from pipeline.deferring import Layerwise, deferred_base, deferred_folder
from pipeline.ground import layerwise, logits
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.device import memory_free, resolve_device
from pipeline.ground.errors import Refused
from pipeline.ground.gates import REPORTED, Limits, judge, limits_of
from pipeline.ground.identity import digest, files_in
from pipeline.ground.manifest import peak_memory
from pipeline.ground.model_config import QUANTIZATION_KEYS, ConfigFile, edited
from pipeline.ground.peft_faults import fault
from pipeline.ground.report import Gate, Status
from pipeline.ground.texts import sample
from pipeline.ground.units import show_bytes
from pipeline.ground.unread import Stream
from pipeline.ground.written import Written
from pipeline.pieces import Merged
from pipeline.same_base import of_base
from pipeline.weight import Adapter, Checkpoint, Output, Weight

_HELD = 4 << 30  # bytes of log-probabilities at once
Compare = Callable[[str, int, Sequence[str], int], logits.Outcome]  # text, tokens, prompts, first token


@dataclass(frozen=True)
class Asked:
    """What a recipe asks of the answers."""

    tokens: int
    text: str | None
    prompts: tuple[str, ...]
    limits: Limits
    device: str
    memory_limit: int | None = None
    layerwise: Layerwise = Layerwise.auto


class _Skipped(Exception):  # noqa: N818  it reads like what happened
    """Why nothing is compared: for the gate, and as a finding."""

    def __init__(self, seen: str, finding: str) -> None:
        self.seen, self.finding = seen, finding


def read_text(path: str) -> str:
    """The text of a file; Refused where it cannot be read."""
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # ~nobody
        raise Refused(f"verify.text: '{path}' cannot be read as text ({error})") from None
    if not text.strip():
        raise Refused(f"verify.text: '{path}' is empty; give a file of text")
    return text


def read_prompts(value: Any) -> tuple[str, ...]:
    """verify.prompts as a recipe may write it: nothing, one prompt, or a list of them."""
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(p, str) and p.strip() for p in found):
        raise Refused(f"verify.prompts: {value!r} is neither a text nor a list of texts")
    return tuple(found)


def answers(
    output: Output,
    base: Checkpoint[Weight],
    adapter: Adapter,
    asked: Asked,
    gates: list[Gate],
    findings: list[str],
) -> logits.Outcome | None:
    """Runs the models and adds gates and findings; None where nothing could be compared."""
    if not asked.tokens:
        return None
    usual = limits_of(output.plan.weights)
    reported = _coded(output) and asked.limits.max_ratio is None  # `retained` judges what codes lose
    wanted = REPORTED if reported else f"ratio <= {asked.limits.over(usual).max_ratio:g}"
    try:
        outcome = _compared(output, base, adapter, asked)
    except _Skipped as reason:
        findings.append(f"logits were not compared{reason.finding}")
        gates.append(Gate("logits", Status.skipped, reason.seen, wanted))
        return None
    except logits.CannotCompare as reason:
        findings.append(f"logits were not compared, because base and adapter do not load: {reason}")
        gates.append(Gate("logits", Status.skipped, "base and adapter do not load", wanted))
        return None
    except logits.MergedDoesNotRun as reason:
        gates.append(Gate("logits", Status.failed, f"the merged model does not run ({reason})", wanted))
        return None
    judged, told = judge(outcome.figures, usual, asked.limits, logits.as_text(outcome.figures), reported)
    gates += judged
    findings += [*outcome.assumed, *told]
    return outcome


def _text(asked: Asked) -> str:
    if asked.text is not None:
        return read_text(asked.text)
    return sample(asked.tokens)


def _round(base: Checkpoint[Weight], tokens: int) -> int:
    """Tokens whose log-probabilities are held at once: one load of the models serves so many."""
    sets = logits.memory_needed(0, _vocabulary(base), logits.SEQUENCE)
    return min(tokens, max(_HELD // sets, 1) * logits.SEQUENCE)


def _in_rounds(asked: Asked, at_once: int, compare: Compare) -> logits.Outcome:
    """The outcome over all tokens; the models are loaded anew for each stretch of them."""
    outcomes: list[logits.Outcome] = []
    for first in range(0, asked.tokens, at_once):
        prompts = () if first else asked.prompts
        try:
            outcomes.append(compare(_text(asked), min(at_once, asked.tokens - first), prompts, first))
        except logits.TextEnds:
            break
    return logits.together(outcomes)


def _vocabulary(base: Checkpoint[Weight]) -> int:
    return max((prod(w.shape[:1]) for w in base.weights if len(w.shape) == 2), default=1)


def _compared(output: Output, base: Checkpoint[Weight], adapter: Adapter, asked: Asked) -> logits.Outcome:
    """Runs the models, whole or layer by layer; _Skipped where there is no reference, or no memory."""
    adapters, at_once = _reference(output, adapter), _round(base, asked.tokens)
    needed = logits.memory_needed(output.plan.num_parameters, _vocabulary(base), at_once)
    wanted = device = resolve_device(asked.device)
    if device != "cpu" and needed > memory_free(device):
        device = "cpu"
    free = asked.memory_limit or memory_free(device)
    if asked.layerwise is Layerwise.always or (needed > free and asked.layerwise is Layerwise.auto):
        compare = _by_layers(output, base, adapters, asked, wanted)
    elif needed > free:
        raise _Skipped(
            "not enough memory",
            f": that takes {show_bytes(needed)} of memory, {show_bytes(free)} are free; "
            "verify.layerwise=auto reads one layer at a time",
        )
    else:
        compare = _whole(output, base, adapters, device)
    outcome = _in_rounds(asked, at_once, compare)
    outcome.figures["peak_memory"] = peak_memory()
    return outcome


Adapters = list[tuple[Path, float]]  # their folders, with the factors that they were merged with


def _whole(output: Output, base: Checkpoint[Weight], adapters: Adapters, device: str) -> Compare:
    """The comparison of models that are in memory, one at a time."""

    def reference() -> str | None:
        held = [(files_in(folder), factor) for folder, factor in adapters]
        return digest(of_base(base, output.merged), held)

    decoded = _decoded_model(output) if _coded(output) else None
    models = logits.Models(output.folder, adapters, base_model(base, output.merged), decoded, reference)
    return lambda text, count, prompts, first: logits.compare(models, text, count, prompts, device, first)


def _by_layers(
    output: Output, base: Checkpoint[Weight], adapters: Adapters, asked: Asked, device: str
) -> Compare:
    """The comparison of models of which one layer is in memory."""
    stream = Stream()
    models = logits.Models(
        output.folder, adapters, deferred_base(base, output.merged, stream), deferred_folder(output, stream)
    )
    layers = layerwise.Layers(stream, asked.memory_limit or memory_free(device), device)

    def compare(text: str, count: int, prompts: Sequence[str], first: int) -> logits.Outcome:
        try:
            return layerwise.compare(models, layers, text, count, prompts, first)
        except layerwise.DoesNotFit as reason:
            raise _Skipped("not enough memory", f": {reason}") from None

    return compare


def _reference(output: Output, adapter: Adapter) -> Adapters:
    """The adapters that base + unmerged adapter is made of; _Skipped where there is no such reference."""
    if methods := {w.combination.method for w in output.merged.weights if isinstance(w, Combined)}:
        raise _Skipped(
            "no reference for the combination",
            f": base and adapters do not add up to what {min(methods)} merges",
        )
    if faults := list(filter(None, (fault(p.config, p.deltas) for p in adapter.parts))):
        raise _Skipped("no reference", f", because PEFT {faults[0]}")
    adapters = _adapters(adapter, output.merged)
    if any(f != 1 for _, f in adapters) and not all(isinstance(d, Lora) for d in adapter.deltas):
        raise _Skipped("no reference for the weight", ": PEFT gives a weight to LoRA only")
    return adapters


def _coded(output: Output) -> bool:
    return any(weight.codes for weight in output.plan.weights)


def _adapters(adapter: Adapter, merged: Checkpoint[Weight]) -> list[tuple[Path, float]]:
    """Each adapter's folder with the factor that it was merged with."""
    factors = {p.part: p.factor for w in merged.weights if isinstance(w, Merged) for p in w.placed}
    return [(part.origin.folder, factors.get(n, 1.0)) for n, part in enumerate(adapter.parts)]


def base_model(base: Checkpoint[Weight], merged: Checkpoint[Weight]) -> Callable[[type], Any]:
    """How to get the base in float32, from its folder or decoded weights, with room for new tokens."""

    edits = merged.config_edits

    def load(cls: Any) -> Any:
        model = plain(cls)
        if vocabulary := edits.get("vocab_size"):
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    def plain(cls: Any) -> Any:
        import torch

        if all(weight.source is not None for weight in base.weights):
            labels = {"num_labels": len(edits["id2label"])} if "id2label" in edits else {}
            return cls.from_pretrained(
                base.origin.folder, dtype=torch.float32, trust_remote_code=False, **labels
            )
        state = {}
        for weight in base.weights:
            with weight.open("cpu") as tiles:
                state[weight.name] = tiles(0, weight.num_rows).value.float().view(weight.shape)
        from transformers import AutoConfig

        config = edited(base.config.read(), base.config_edits)
        made = AutoConfig.for_model(**config)
        return cls.from_pretrained(None, config=made, state_dict=state, dtype=torch.float32)

    return load


def _decoded_model(output: Output) -> Callable[[type], Any]:
    """How to get the output in float32, its codes decoded here and not by the loader."""

    def load(cls: Any) -> Any:
        import torch
        from transformers import AutoConfig

        folder = Written(output.folder)
        state = {
            w.name: folder.rows(w.name, 0, prod(w.shape[:-1])).float().view(w.shape)
            for w in output.plan.weights
        }
        config = edited(ConfigFile(output.folder / "config.json").read(), {QUANTIZATION_KEYS[0]: None})
        made = AutoConfig.for_model(**config)
        return cls.from_pretrained(None, config=made, state_dict=state, dtype=torch.float32)

    return load
