"""extract=svd: the best adapter of a given rank out of a full fine-tune, or out of other adapters."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pipeline.extraction import outputs
from pipeline.extraction.calibrating import Calibrated, Calibrating, Calibration
from pipeline.extraction.choice import Asked, Chosen, Rest, check_patterns, choose, without_place
from pipeline.extraction.decomposing import bytes_needed, decompose, workers_for
from pipeline.extraction.engines import Engine, check_for, fitted, menu_of, scaled
from pipeline.extraction.identity import key
from pipeline.extraction.result import (
    Extraction,
    check_budget,
    facts,
    most_bytes,
    planned,
    ranks,
    spool_bytes,
)
from pipeline.extraction.rule import Rule
from pipeline.extraction.sides import Sides, saved_whole
from pipeline.extraction.tensors import Content, Layout
from pipeline.extraction.writing import config, write
from pipeline.ground import workplace
from pipeline.ground.adapter_format import CONFIG, WEIGHTS, read_adapter
from pipeline.ground.deltas.delta import Delta
from pipeline.ground.device import check_device, memory_free, resolve_device
from pipeline.ground.digests import ahead
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.hub import Source
from pipeline.ground.lowrank import Method
from pipeline.ground.manifest import published
from pipeline.ground.progress import say
from pipeline.ground.report import Finding
from pipeline.ground.spool import Spool
from pipeline.output.stream import num_workers
from pipeline.settings import set_as
from pipeline.stage import Extract, stage
from pipeline.stages.extract.peft import Peft
from pipeline.weight import Adapter, Part


@stage("svd")
@dataclass(frozen=True, kw_only=True)
class Svd(Extract):
    """Compares base and fine-tune, then decomposes one difference after the other."""

    resumes: ClassVar[bool] = True

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
    engine: Engine = field(default=Engine.peft, metadata=set_as("save", "for_"))
    """what is to load the adapter; only what that takes is extracted"""
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
        if self.max_rank is not None and self.max_rank % self.multiple_of:
            raise Refused(f"max_rank: {self.max_rank} is not a multiple_of {self.multiple_of}")
        check_for(
            self.engine,
            ranks=[self.rank, *self.rank_pattern.values()],
            alpha_pattern=self.alpha_pattern,
            rslora=self.rslora,
            saved=self.saved_modules,
        )
        if self._calibration:
            self._calibration.check()

    def plan(self) -> Adapter:
        if not self.dry_run:
            ahead(self._sides.files)
        chosen = self._chosen
        if self._calibrating:
            self._calibrating.check(self.output, self.dry_run)
        lora = [(p, self._rule.most(p)) for p in chosen.lora]
        extraction = self._extraction(chosen)
        settings = config(Content(lora, chosen), self._scaled(rank for _, rank in lora), copies=False)
        return Adapter((self._part(planned(chosen, self._rule), settings, extraction),))

    def __call__(self) -> Adapter:
        begun = time.monotonic()
        chosen, rule, dtype = self._chosen, self._rule, self.factors.value
        keys, compared = self._keys, self._sides.compared
        sides = self._sides
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with Spool(workplace.standing(self.output), (*keys, compared)) as spool:
            if spool.num_removed:
                say(f"note: what an earlier run left for other inputs or settings is removed: {spool.folder}")
            if spool.told(compared) is None:
                spool.finish(compared, {name: astuple(c) for name, c in (sides.changes or {}).items()})
            seen = self._calibrating(self._folder.parent) if self._calibrating else Calibrated({})
            device = resolve_device(self.device)
            found = decompose(chosen.lora, rule, device, self._workers, spool, keys, seen.inputs)
            kept = ranks(chosen, rule, dtype, found)
            content = Content([(p, r) for p, r in zip(chosen.lora, kept, strict=True) if r], chosen)
            if not content.lora:
                raise Refused("rank: no difference rises above the rounding noise of the fine-tune")
            by_name = {p.name: d for p, d in zip(chosen.lora, found, strict=True)}
            write(self._folder, content, self._scaled(kept), by_name, spool)
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
            files=(*own, *self._sides.tuned.files),
            side_files=() if self._sides.tuned is self._sides.base else self._sides.tuned.side_files,
            findings=(*extraction.chosen.findings, *self._strangers, *self._rounded_up),
            extraction=extraction,
        )

    def _extraction(self, chosen: Chosen) -> Extraction:
        disk = most_bytes(chosen, self._rule, self.factors.value)
        workers = num_workers() if self.dry_run else self._workers
        memory = workers * max(bytes_needed(p, self._calibration is not None) for p in chosen.lora)
        if self._calibrating:
            memory = max(memory, self._calibrating.most_memory)
        texts = (self._calibration.file,) if self._calibration else ()
        spool = spool_bytes(chosen, self._rule)
        return Extraction(self._sides.base, self._sides.tuned, chosen, disk, spool, memory, texts=texts)

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
        tuned, lora = self._sides.tuned, self._chosen.lora
        return Calibrating(self._calibration, self._sides.base, tuned, lora, device, self.memory_limit)

    @cached_property
    def _sides(self) -> Sides:
        peft = Peft(adapter=self.adapter, dry_run=self.dry_run)
        device = self.device if self.dry_run else resolve_device(self.device)
        return Sides(self.base_model, self.finetune, peft, self.names, self.output, device, self.dry_run)

    @cached_property
    def _keys(self) -> list[str]:
        """The keys of all matrices of each parameter of low rank, decomposed."""
        inputs, calibration = self._sides.inputs, self._calibration and self._calibration.fingerprint
        return [key(inputs, calibration, p, self._rule.asks(p)) for p in self._chosen.lora]

    @cached_property
    def _strangers(self) -> tuple[Finding, ...]:
        """What no adapter can hold; looked for before anything is decomposed, since it may be refused."""
        return (
            tuple(without_place(self._sides.parameters[1], self._sides.changes, self.rest))
            if self._sides.changes
            else ()
        )

    @cached_property
    def _chosen(self) -> Chosen:
        saved = self.saved_modules
        if not self.finetune and saved is None:
            saved = tuple(f"re:{re.escape(name)}" for name in saved_whole(self._sides.pairs))
        found, patterns = self._sides.parameters[0], (self.rank_pattern, self.alpha_pattern)
        check_patterns(found, dict(zip(("rank_pattern", "alpha_pattern"), patterns, strict=True)))
        carried = not self.finetune and self.targeted_modules is None and self.rest is Rest.refuse
        rest = Rest.save if carried else self.rest  # all that adapters hold is meant
        asked = Asked(self.targeted_modules, saved or None, rest, self._rule.exceeds)
        chosen = choose(found, self._sides.changes, asked, self._sides.model)
        chosen = fitted(chosen, self.engine, self._layout, self._sides.changes, self.saved_modules)
        if not chosen.lora:
            raise Refused(
                f"targeted_modules: only {chosen.saved[0].name} and the like changed, and PEFT takes no "
                "adapter of saved modules alone"
            )
        self._rule.check(chosen.lora)
        if not self.dry_run:
            check_budget(chosen, self._rule, self.factors.value)
            _ = self._strangers
        return chosen

    @cached_property
    def _rule(self) -> Rule:
        assert self.rank is not None
        pattern, menu = {n: int(r) for n, r in self.rank_pattern.items()}, menu_of(self.engine)
        return Rule(self.rank, pattern, self.max_rank, self.multiple_of, self.method, self.seed, menu)

    @property
    def _rounded_up(self) -> list[Finding]:
        rank = self._rule.rounded_up(self.rank) if isinstance(self.rank, int) else self.rank
        why = f"which {self.engine.value} allots for it anyway"
        return [] if rank == self.rank else [Finding(f"rank {self.rank} becomes {rank}, {why}")]

    def _scaled(self, ranks: Iterable[int]) -> Layout:
        return scaled(self._layout, self.engine, max(ranks, default=1))

    @cached_property
    def _layout(self) -> Layout:
        sides = self._sides
        origin, said = sides.base.origin, sides.base.config.read()
        shares = sides.base.config.tied is not False and sides.tuned.config.tied is not False
        head = sides.model.head if sides.model else "lm_head" if sides.base.config.tied else None
        own = any(head and pair.name.endswith(f"{head}.weight") for pair in sides.pairs)
        return Layout(
            alpha=self.alpha,
            alpha_pattern=self.alpha_pattern,
            rslora=self.rslora,
            dtype=self.factors.value,
            trained_on=published(origin).name,
            revision=origin.commit,
            architectures=said.get("architectures") or [],
            modules=sides.model.modules if sides.model else (),
            head=head if shares and not own else None,
        )

    @property
    def _folder(self) -> Path:
        name = re.sub(r"[^\w.-]", "_", published(self._sides.tuned.origin).name) + "-lora"
        return workplace.scratch(self.output) / name

    @property
    def _workers(self) -> int:
        device = resolve_device(self.device)
        free = self.memory_limit or memory_free(device) // 2
        most = num_workers() if device == "cpu" else 2
        return workers_for(self._chosen.lora, most, free, self._calibration is not None)


def _left_out(names: list[str]) -> str:
    return f"nothing of {names[0]} is worth a rank ({len(names)} modules are left out)"
