"""verify=standard: the files, samples of every merged weight in float64, and the model's answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.combined import Combined
from pipeline.ground import logits
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.errors import Refused
from pipeline.ground.model_config import edited
from pipeline.ground.progress import Progress
from pipeline.ground.reference import Facts, Folder, Reference, compare, sampled_rows, size_of_terms
from pipeline.ground.report import Action, Gate, Report, Status
from pipeline.ground.rounding import round_to
from pipeline.ground.units import show_bytes
from pipeline.stage import Verify, stage
from pipeline.stages.verify.structure import effect, files, hashes, report
from pipeline.weight import Adapter, Checkpoint, Merged, Output, Placed, Weight

if TYPE_CHECKING:
    from torch import Tensor


_FAINT = 1e-6  # nats of KL(adapter||base) per token, of the order that rounding to 16 bits costs
_ALL_LOST = 0.5  # the ratio KL(adapter||merged) / KL(adapter||base) beyond which most of the effect is gone


@stage("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Verify):
    """Files, weights and logits; a tier that fails skips the ones after it."""

    tokens: int = 512
    """tokens of text on which logits are compared; 0 leaves that out"""
    prompt: str | None = None
    """something that base, adapter and merged model each answer, for people to read"""
    max_ratio: float = 0.01
    """largest KL(adapter||merged) / KL(adapter||base), judged by its 95 % interval"""
    min_retained: float = 0.9
    """least share of the deltas that survives rounding"""

    def check(self) -> None:
        check_device(self.device)
        if self.tokens < 0:
            raise Refused(f"verify.tokens: {self.tokens} is not a number of tokens; 0 compares no logits")

    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report:
        begun = time.monotonic()
        findings: list[str] = []
        weights = output.statistics_as_dicts()
        gates = files(output, base)
        if _all_passed(gates):
            gates.append(converted(output))
            facts = recompute(output, adapter)
            weights = {name: {**weights.get(name, {}), **f.as_dict()} for name, f in facts.items()}
            gates += self._judged(output, facts, weights, findings)
        outcome = None
        if _all_passed(gates):
            outcome = self._answers(output, base, adapter, gates, findings)
        gates += hashes(output)
        return report(
            output,
            gates,
            *findings,
            base=base,
            weights=weights,
            logits=outcome.figures if outcome else None,
            answers=outcome.answers if outcome else None,
            seconds=time.monotonic() - begun,
        )

    def _judged(
        self, output: Output, facts: dict[str, Facts], weights: dict[str, dict[str, Any]], findings: list[str]
    ) -> list[Gate]:
        gates = [rounding(output, facts)]
        if output.statistics:
            gates.append(effect(weights))
        else:
            gates.append(_sampled_effect(facts))
        if still := [name for name, f in facts.items() if not f.energy]:
            findings.append(f"the delta of {still[0]} is zero ({len(still)} weights)")
        energy = sum(f.energy for f in facts.values())
        retained = sum(f.kept for f in facts.values()) / energy if energy else 1.0
        status = Status.passed if retained >= self.min_retained else Status.failed
        hint = "" if status is Status.passed else "; save.dtype=float16 or float32 rounds less"
        gates.append(
            Gate("retained", status, f"{retained:.4f} of the delta{hint}", f">= {self.min_retained:g}")
        )
        weak = [n for n, f in facts.items() if f.energy and f.kept / f.energy < self.min_retained]
        if weak and status is Status.passed:
            findings.append(
                f"rounding kept less than {self.min_retained:g} of the delta of {weak[0]} "
                f"({len(weak)} weights)"
            )
        return gates

    def _answers(
        self,
        output: Output,
        base: Checkpoint[Weight],
        adapter: Adapter,
        gates: list[Gate],
        findings: list[str],
    ) -> logits.Outcome | None:
        name, wanted = "logits", f"ratio <= {self.max_ratio:g}"
        if not self.tokens:
            return None
        if methods := {w.combination.method for w in output.merged.weights if isinstance(w, Combined)}:
            findings.append(
                f"logits were not compared: base and adapters do not add up to what {min(methods)} merges"
            )
            gates.append(Gate(name, Status.skipped, "no reference for the combination", wanted))
            return None
        vocabulary = max((prod(w.shape[:1]) for w in base.weights if len(w.shape) == 2), default=1)
        needed = logits.memory_needed(output.plan.num_parameters, vocabulary, self.tokens)
        device = resolve_device(self.device)
        if device != "cpu" and needed > logits.memory_free(device):
            device = "cpu"
        free = self.memory_limit or logits.memory_free(device)
        if needed > free:
            findings.append(
                f"logits were not compared: that takes {show_bytes(needed)} of memory, "
                f"{show_bytes(free)} are free"
            )
            gates.append(Gate(name, Status.skipped, "not enough memory", wanted))
            return None
        models = logits.Models(
            output.folder, _adapters(adapter, output.merged), base_model(base, output.merged)
        )
        text = package_files("pipeline.ground").joinpath("sample.txt").read_text("utf-8")
        if any(f != 1 for _, f in models.adapters) and not all(isinstance(d, Lora) for d in adapter.deltas):
            findings.append("logits were not compared: PEFT gives a weight to LoRA only")
            gates.append(Gate(name, Status.skipped, "no reference for the weight", wanted))
            return None
        try:
            outcome = logits.compare(models, text, self.tokens, self.prompt, device)
        except logits.CannotCompare as reason:
            findings.append(f"logits were not compared, because base and adapter do not load: {reason}")
            gates.append(Gate(name, Status.skipped, "base and adapter do not load", wanted))
            return None
        except logits.MergedDoesNotRun as reason:
            gates.append(Gate(name, Status.failed, f"the merged model does not run ({reason})", wanted))
            return None
        findings += outcome.assumed
        gates.append(
            Gate(name, self._judge(outcome.figures, findings), logits.as_text(outcome.figures), wanted)
        )
        return outcome

    def _judge(self, figures: dict[str, Any], findings: list[str]) -> Status:
        low, effect = figures["ratio_interval"][0], figures["kl_adapter_base"]
        if low <= self.max_ratio and figures["finite"]:
            return Status.passed
        if figures["finite"] and effect < _FAINT and low < _ALL_LOST:
            findings.append(
                f"the adapter moves predictions on this text by {effect:.1g} nats only, about what rounding does: "
                "too little to judge the merge by"
            )
            return Status.skipped
        return Status.failed


def _all_passed(gates: list[Gate]) -> bool:
    return all(gate.status is not Status.failed for gate in gates)


def _adapters(adapter: Adapter, merged: Checkpoint[Weight]) -> list[tuple[Path, float]]:
    """Each adapter's folder with the factor that it was merged with."""
    factors = {p.part: p.factor for w in merged.weights if isinstance(w, Merged) for p in w.placed}
    return [(part.origin.folder, factors.get(n, 1.0)) for n, part in enumerate(adapter.parts)]


def recompute(output: Output, adapter: Adapter) -> dict[str, Facts]:
    """Samples of every merged weight of the folder against base + delta in float64."""
    folder, found = Folder(output.folder), {}
    merged = [w for w in output.merged.weights if isinstance(w, Merged)]
    planned = {w.name: w for w in output.plan.weights}
    with (
        ExitStack() as opened,
        Progress("recomputing samples", sum(planned[w.name].num_bytes for w in merged)) as bar,
    ):
        references = [
            opened.enter_context(Reference(part.origin.folder, part.config)) for part in adapter.parts
        ]
        for weight in merged:
            bar.advance(planned[weight.name].num_bytes)
            facts, dtype = Facts(), planned[weight.name].dtype
            found[weight.name] = facts
            plain = all(is_plain(placed, weight) for placed in weight.placed)
            samples = sampled_rows(weight.name, weight.num_rows, weight.num_columns, weight.grain)
            with replace(weight, arithmetic="F64").open("cpu") as tiles, weight.base.open("cpu") as bases:
                for start, stop in samples:
                    if plain:
                        base = bases(start, stop).base
                        delta, size = added(references, weight.placed, start, stop)
                    else:
                        tile = tiles(start, stop)
                        base, delta = tile.base, tile.value - tile.base.double()
                        size = size_of_terms(base, delta)
                    rows = folder.rows(weight.name, start, stop)
                    compare(facts, rows, dtype, base, round_to(base, dtype), delta, size)
    return found


def is_plain(placed: Placed, weight: Merged) -> bool:
    """Whether it is nothing but B @ A on all of the weight, as its file has it."""
    delta = placed.delta
    if isinstance(weight, Combined):
        return False
    if not isinstance(delta, Lora) or len(delta.A.shape) != 2 or delta.blocks != (1, 1) or delta.transposed:
        return False
    return delta.shape == weight.shape and placed.rows == (0, weight.num_rows) and delta.scale > 0


def added(
    references: Sequence[Reference], placed: Sequence[Placed], start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Rows of the sum of plain deltas, and of the sizes that their slack is taken of."""
    parts = [references[p.part].delta(p.delta.module, p.factor, start, stop) for p in placed]
    deltas, sizes = zip(*parts, strict=True)
    return sum(deltas[1:], deltas[0]), sum(sizes[1:], sizes[0])


def converted(output: Output) -> Gate:
    """Samples of weights that were decoded or cast: the base's value, rounded once."""
    folder, wrong, count = Folder(output.folder), [], 0
    planned = {w.name: w for w in output.plan.weights}
    for weight in output.merged.weights:
        plan = planned[weight.name]
        if plan.action not in (Action.decoded, Action.cast, Action.saved):
            continue
        count += 1
        with weight.open("cpu") as tiles:
            for start, stop in sampled_rows(weight.name, weight.num_rows, weight.num_columns, weight.grain):
                value = round_to(tiles(start, stop).value, plan.dtype)
                rows = folder.rows(weight.name, start, stop).view(value.shape)
                if not bool(((rows == value) | (rows.isnan() & value.isnan())).all()):
                    wrong.append(weight.name)
                    break
    wanted = "the base's values rounded once"
    if wrong:
        return Gate("converted", Status.failed, f"{wrong[0]} differs ({len(wrong)} weights)", wanted)
    return Gate("converted", Status.passed, f"{count} weights as decoded", wanted)


def rounding(output: Output, facts: dict[str, Facts]) -> Gate:
    """Merged weights within half a unit in the last place; a figure only where arithmetic is narrower."""
    if not facts:
        return Gate("rounding", Status.passed, "no weight is merged", "half a unit in the last place")
    worst = max(facts, key=lambda name: facts[name].worst_ulp)
    beyond = sum(f.beyond for f in facts.values())
    raw, elements = max(f.worst_raw_ulp for f in facts.values()), sum(f.elements for f in facts.values())
    seen = (
        f"worst {facts[worst].worst_ulp:.4f} ulp beyond the slack ({raw:.2f} with it), {elements:,} elements"
    )
    if not {"float32", "float64"} & set(output.plan.merge_dtype.split(", ")):
        return Gate("rounding", Status.passed, seen, f"reported only: merged in {output.plan.merge_dtype}")
    if beyond:
        seen += f"; {beyond} too far off, the worst in {worst}"
    return Gate(
        "rounding",
        Status.failed if beyond else Status.passed,
        seen,
        "half a unit and the slack of a float32 sum",
    )


def _sampled_effect(facts: dict[str, Facts]) -> Gate:
    same = [name for name, f in facts.items() if f.energy and not f.changed]
    broken = [name for name, f in facts.items() if f.not_finite]
    seen = f"{len(facts) - len(same)} of {len(facts)} merged weights changed"
    seen += f", not {same[0]}" if same else ""
    seen += f"; {broken[0]} is not finite" if broken else ""
    return Gate("effect", Status.failed if same or broken else Status.passed, seen, "all of them, all finite")


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
