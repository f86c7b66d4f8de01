"""verify=standard: the files, samples of every merged weight in float64, and the model's answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files as package_files
from math import prod
from pathlib import Path
from typing import Any

from pipeline.combined import Combined
from pipeline.ground import logits
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.errors import Refused
from pipeline.ground.model_config import QUANTIZATION_KEYS, ConfigFile, edited
from pipeline.ground.peft_faults import fault
from pipeline.ground.reference import Facts
from pipeline.ground.report import Gate, Report, Status
from pipeline.ground.units import show_bytes
from pipeline.ground.written import Written
from pipeline.recomputing import converted, recompute, rounding
from pipeline.stage import Verify, stage
from pipeline.stages.verify.extraction import Proof, extracted, proof
from pipeline.stages.verify.structure import effect, files, hashes, report
from pipeline.weight import Adapter, Checkpoint, Merged, Output, Weight

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
        proved = self._proof(output, adapter)
        if output.is_adapter:
            return extracted(output, proved, begun)
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
        gates += [*proved.gates, *hashes(output)]
        return report(
            output,
            gates,
            *findings,
            *proved.findings,
            extraction=proved.as_dict(),
            base=base,
            weights=weights,
            logits=outcome.figures if outcome else None,
            answers=outcome.answers if outcome else None,
            seconds=time.monotonic() - begun,
        )

    def _proof(self, output: Output, adapter: Adapter) -> Proof:
        """What is asked of an adapter that this run has extracted."""
        device = resolve_device(self.device)
        return proof(output, adapter, self.tokens, device, self.memory_limit, base_model)

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
        hint = "" if status is Status.passed else _hint(output)
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
        coded = any(weight.codes for weight in output.plan.weights)
        name = "logits"
        wanted = "reported only: the output is quantized" if coded else f"ratio <= {self.max_ratio:g}"
        if not self.tokens:
            return None
        if methods := {w.combination.method for w in output.merged.weights if isinstance(w, Combined)}:
            findings.append(
                f"logits were not compared: base and adapters do not add up to what {min(methods)} merges"
            )
            gates.append(Gate(name, Status.skipped, "no reference for the combination", wanted))
            return None
        if faults := list(filter(None, (fault(p.config, p.deltas) for p in adapter.parts))):
            findings.append(f"logits were not compared, because PEFT {faults[0]}")
            gates.append(Gate(name, Status.skipped, "no reference", wanted))
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
            output.folder,
            _adapters(adapter, output.merged),
            base_model(base, output.merged),
            _decoded_model(output) if coded else None,
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
        status = Status.passed if coded else self._judge(outcome.figures, findings)
        gates.append(Gate(name, status, logits.as_text(outcome.figures), wanted))
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


def _sampled_effect(facts: dict[str, Facts]) -> Gate:
    same = [name for name, f in facts.items() if f.energy and not f.changed]
    broken = [name for name, f in facts.items() if f.not_finite]
    seen = f"{len(facts) - len(same)} of {len(facts)} merged weights changed"
    seen += f", not {same[0]}" if same else ""
    seen += f"; {broken[0]} is not finite" if broken else ""
    return Gate("effect", Status.failed if same or broken else Status.passed, seen, "all of them, all finite")


def _hint(output: Output) -> str:
    """What would keep more of the deltas."""
    if any(weight.codes for weight in output.plan.weights):
        return "; 16 bits keep it, verify.min_retained says with how little the run may pass"
    return "; save.dtype=float16 or float32 rounds less, save.rounding=auto keeps it on average"


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
