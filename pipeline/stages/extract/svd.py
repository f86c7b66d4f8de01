"""extract=svd: the best adapter of a given rank out of a full fine-tune, or out of other adapters."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.dequantizing import dense
from pipeline.extraction import outputs
from pipeline.extraction.calibrating import Calibrated, Calibrating, Calibration
from pipeline.extraction.choice import Chosen, Rest, choose, without_place
from pipeline.extraction.decomposing import Rule, bytes_needed, decompose, workers_for
from pipeline.extraction.differences import Change, compare
from pipeline.extraction.pairs import Pair, paired
from pipeline.extraction.parameters import Parameter, parameters
from pipeline.extraction.result import Extraction, facts, most_bytes, planned, ranks
from pipeline.extraction.tensors import Content, Layout
from pipeline.extraction.writing import config, write
from pipeline.ground import workplace
from pipeline.ground.adapter_format import CONFIG, WEIGHTS, read_adapter
from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.device import check_device, resolve_device
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.hub import Source
from pipeline.ground.logits import memory_free
from pipeline.ground.lowrank import Method
from pipeline.ground.manifest import published
from pipeline.ground.model_modules import Model, in_memory
from pipeline.ground.report import Finding
from pipeline.ground.spool import Spool
from pipeline.loading import load_checkpoint
from pipeline.merging import merged
from pipeline.pieces import FromAdapter, Merged
from pipeline.stage import Extract, stage
from pipeline.stages.extract.peft import Peft
from pipeline.stream import num_workers
from pipeline.tying import Tied
from pipeline.weight import Adapter, Checkpoint, Part, Weight


@stage("svd")
@dataclass(frozen=True, kw_only=True)
class Svd(Extract):
    """Compares base and fine-tune, then decomposes one difference after the other."""

    base_model: str
    """folder, GGUF file or hub id of the base checkpoint"""
    output: Path
    """folder to create"""
    finetune: str | None = None
    """the fine-tuned checkpoint; without it, `adapter` is what is decomposed"""
    device: str = "cpu"
    """where differences are decomposed"""
    names: dict[str, str] = field(default_factory=dict)
    """renames {from: to} from adapter modules to checkpoint names"""
    seed: int = 0
    """of the random blocks that singular vectors are searched with"""
    memory_limit: int | None = None
    """bytes for matrices in memory, beyond the libraries"""

    rest: Rest = Rest.refuse
    """what becomes of a changed weight that is neither targeted nor saved: refuse, skip or save"""
    method: Method = Method.auto
    """how singular vectors are found: auto (by size), gram, krylov or exact"""
    factors: FloatDtype = FloatDtype.float32
    """dtype of lora_A and lora_B"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead of alpha / rank"""
    calibration: str | None = None
    """file of text; what modules give for it is then kept as near as can be, not their weights"""
    calibration_tokens: int = 16384
    """tokens that are read of it, one of eight to judge by; a module with n inputs needs n of the others"""
    shrinkage: float = 0.01
    """share of the mean that is added to each input's second moment"""

    def check(self) -> None:
        check_device(self.device)
        if self.rank is None:
            raise Refused("rank: is not set; give a number, auto, {energy: 0.95} or {parameters: 40M}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise Refused(f"alpha: {self.alpha} is not a number above 0")
        if self._calibration:
            self._calibration.check()

    def plan(self) -> Adapter:
        chosen = self._chosen
        if self._calibrating:
            self._calibrating.check(self.output, self.dry_run)
        lora = [(p, self._rule.most(p)) for p in chosen.lora]
        extraction = self._extraction(chosen)
        settings = config(Content(lora, chosen), self._layout, copies=False)
        return Adapter((self._part(planned(chosen, self._rule), settings, extraction),))

    def __call__(self) -> Adapter:
        begun = time.monotonic()
        chosen, rule, dtype = self._chosen, self._rule, self.factors.value
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with Spool(self._folder.parent / "factors") as spool:
            seen = self._calibrating(self._folder.parent) if self._calibrating else Calibrated({})
            device = resolve_device(self.device)
            found = decompose(chosen.lora, rule, device, self._workers, spool, seen.inputs)
            kept = ranks(chosen, rule, dtype, found)
            content = Content([(p, r) for p, r in zip(chosen.lora, kept, strict=True) if r], chosen)
            if not content.lora:
                raise Refused("rank: no difference rises above the rounding noise of the fine-tune")
            by_name = {p.name: d for p, d in zip(chosen.lora, found, strict=True)}
            write(self._folder, content, self._layout, by_name, spool)
        figures = {p.name: facts(p, r, by_name[p.name]) for p, r in zip(chosen.lora, kept, strict=True)}
        without = [p.name for p, r in zip(chosen.lora, kept, strict=True) if not r]
        if without:
            chosen = replace(chosen, findings=(*chosen.findings, Finding(_left_out(without))))
        told = (*chosen.findings, *seen.findings, *outputs.told(figures))
        extraction = replace(
            self._extraction(replace(chosen, findings=told)),
            facts=figures,
            seconds=time.monotonic() - begun,
            inputs=seen.inputs,
        )
        file = read_adapter(self._folder)
        return Adapter((self._part(file.deltas, file.config, extraction),))

    def _part(self, deltas: tuple[Delta, ...], settings: Mapping[str, Any], extraction: Extraction) -> Part:
        own = tuple(
            File.at(path) for path in (self._folder / WEIGHTS, self._folder / CONFIG) if path.is_file()
        )
        return Part(
            deltas=deltas,
            config=settings,
            origin=Source(self._folder, self.finetune or self._folder.name),
            files=(*own, *self._tuned.files),
            side_files=() if self._tuned is self._base else self._tuned.side_files,
            findings=(*extraction.chosen.findings, *self._strangers),
            extraction=extraction,
        )

    def _extraction(self, chosen: Chosen) -> Extraction:
        disk = most_bytes(chosen, self._rule, self.factors.value)
        workers = num_workers() if self.dry_run else self._workers
        memory = workers * max(bytes_needed(p, self._calibration is not None) for p in chosen.lora)
        if self._calibrating:
            memory = max(memory, self._calibrating.most_memory)
        texts = (self._calibration.file,) if self._calibration else ()
        return Extraction(self._base, self._tuned, chosen, disk, memory, texts=texts)

    @cached_property
    def _calibration(self) -> Calibration | None:
        """What a calibration depends on beside the checkpoints; its `fingerprint` tells it from others."""
        if self.calibration is None:
            return None
        return Calibration(self.calibration, self.calibration_tokens, self.shrinkage)

    @cached_property
    def _calibrating(self) -> Calibrating | None:
        if self._calibration is None:
            return None
        device = self.device if self.dry_run else resolve_device(self.device)
        tuned, lora = self._tuned, self._chosen.lora
        return Calibrating(self._calibration, self._base, tuned, lora, device, self.memory_limit)

    @cached_property
    def _base(self) -> Checkpoint[Weight]:
        return dense(load_checkpoint("base_model", self.base_model, download=not self.dry_run))

    @cached_property
    def _tuned(self) -> Checkpoint[Weight]:
        """The fine-tune; of adapters, the merge of them into the base, to come."""
        if self.finetune:
            return dense(load_checkpoint("finetune", self.finetune, download=not self.dry_run))
        adapter = Peft(adapter=self.adapter, dry_run=self.dry_run)()
        found = merged(self._base, adapter, 1.0, "F32", self.names, Tied.auto)
        for weight in found.weights:
            for placed in weight.placed if isinstance(weight, Merged) else ():
                if placed.delta.replaces and not isinstance(placed.delta, Saved):
                    raise Refused(
                        f"adapter: '{placed.delta.module}' has {placed.describe()}, whose change depends on "
                        "the base and is no sum; merge it, and extract from the result with finetune="
                    )
        tokenizer = next((p.side_files for p in adapter.parts if p.side_files), ())
        return replace(found, side_files=tokenizer, files=adapter.files, origin=adapter.parts[0].origin)

    @cached_property
    def _pairs(self) -> tuple[Pair, ...]:
        return paired(self._base, self._tuned)

    @cached_property
    def _changes(self) -> dict[str, Change] | None:
        """The comparing pass; a dry run reads no weight."""
        return None if self.dry_run else dict(compare(self._pairs, resolve_device(self.device)))

    @cached_property
    def _model(self) -> Model | None:
        return None if self.dry_run else in_memory(self._base.config.read())

    @cached_property
    def _parameters(self) -> tuple[tuple[Parameter, ...], tuple[Pair, ...]]:
        return parameters(self._pairs, self._model, self._base.config.model_type)

    @cached_property
    def _strangers(self) -> tuple[Finding, ...]:
        return tuple(without_place(self._parameters[1], self._changes)) if self._changes else ()

    @cached_property
    def _chosen(self) -> Chosen:
        saved = self.saved_modules
        if not self.finetune and saved is None:
            saved = tuple(f"re:{re.escape(name)}" for name in _saved_by_adapters(self._pairs))
        chosen = choose(self._parameters[0], self._changes, self.targeted_modules, saved or None, self.rest)
        if not chosen.lora:
            raise Refused(
                f"targeted_modules: only {chosen.saved[0].name} and the like changed, and PEFT takes no "
                "adapter of saved modules alone"
            )
        self._rule.check(chosen.lora)
        return chosen

    @cached_property
    def _rule(self) -> Rule:
        assert self.rank is not None
        pattern = {name: int(rank) for name, rank in self.rank_pattern.items()}
        return Rule(self.rank, pattern, self.max_rank, self.multiple_of, self.method, self.seed)

    @cached_property
    def _layout(self) -> Layout:
        origin, said = self._base.origin, self._base.config.read()
        shares = self._base.config.tied is not False and self._tuned.config.tied is not False
        heads = {pair.name for pair in self._pairs if pair.name.endswith("lm_head.weight")}
        return Layout(
            alpha=self.alpha,
            alpha_pattern=self.alpha_pattern,
            rslora=self.rslora,
            dtype=self.factors.value,
            trained_on=published(origin).name,
            revision=origin.commit,
            architectures=said.get("architectures") or [],
            modules=self._model.modules if self._model else (),
            tied=bool(self._base.config.tied) and shares and not heads,
        )

    @property
    def _folder(self) -> Path:
        name = re.sub(r"[^\w.-]", "_", published(self._tuned.origin).name) + "-lora"
        return workplace.scratch(self.output) / name

    @property
    def _workers(self) -> int:
        device = resolve_device(self.device)
        free = self.memory_limit or memory_free(device) // 2
        most = num_workers() if device == "cpu" else 2
        return workers_for(self._chosen.lora, most, free, self._calibration is not None)


def _left_out(names: list[str]) -> str:
    return f"nothing of {names[0]} is worth a rank ({len(names)} modules are left out)"


def _saved_by_adapters(pairs: tuple[Pair, ...]) -> list[str]:
    """The modules that adapters hold whole."""
    return [
        pair.name.rpartition(".")[0]
        for pair in pairs
        if isinstance(pair.tuned, FromAdapter)
        or (isinstance(pair.tuned, Merged) and any(isinstance(p.delta, Saved) for p in pair.tuned.placed))
    ]
