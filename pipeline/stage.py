"""The six slots of a run, and the register of the stages that can fill them.

A stage is a frozen dataclass: its fields are its settings, their defaults the defaults, and calling it
does its work. `@stage("exact")` on a `Merge` makes it choosable as `merge=exact`; `@choice(Merge)` on a
function makes `merge=auto`, which names one of them once the request is known. Installed packages add
theirs through the entry-point group `pipeline.stages`: a module that is imported, nothing more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, ClassVar, TypeVar

from pipeline.ground import workplace
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.ranks import Rank
from pipeline.ground.report import Plan, Report
from pipeline.weight import Adapter, Checkpoint, Output, Stored, Tied, Weight


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):  # noqa: B024  its slots say what calling means
    """What all stages share."""

    def check(self) -> None:
        """Refused for whatever is wrong with its own settings and inputs, before anything is read."""
        return


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter that the request names, and its share among several."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Extract(Stage):
    resumes: ClassVar[bool] = False  # keeps in the workplace what a later run need not do again

    adapter: tuple[Chosen, ...]
    """folders or hub ids of adapters, with their weights"""
    targeted_modules: tuple[str, ...] | None = None
    """what the adapter may touch: names, globs or re:patterns"""
    saved_modules: tuple[str, ...] | None = None
    """what the adapter holds whole"""
    rank: Rank | None = None
    """the rank the adapter must have, or a rule by which it gets one"""
    rank_pattern: dict[str, float] = field(default_factory=dict)
    """ranks of some modules, {name: rank}"""
    max_rank: int | None = None
    """the largest rank that a module may get"""
    multiple_of: int = 1
    """ranks are a multiple of this"""
    alpha: float | None = None
    """the alpha the adapter must have"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """alphas of some modules, {name: alpha}"""

    dry_run: bool = False
    """take only what lies on this machine; download nothing"""

    def plan(self) -> Adapter:
        """The adapter as far as headers and configs tell, for a stage that makes it when it is called."""
        return self()

    @abstractmethod
    def __call__(self) -> Adapter: ...


@dataclass(frozen=True, kw_only=True)
class Load(Stage):
    base_model: str
    """folder, GGUF file or hub id of the base checkpoint"""

    dry_run: bool = False
    """take only what lies on this machine; download nothing"""

    @abstractmethod
    def __call__(self) -> Checkpoint[Stored]: ...


@dataclass(frozen=True, kw_only=True)
class Dequantize(Stage):
    @abstractmethod
    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]: ...


@dataclass(frozen=True, kw_only=True)
class Merge(Stage):
    merge_dtype: FloatDtype
    """dtype in which W + delta is computed"""
    names: dict[str, str] = field(default_factory=dict)
    """renames {from: to} from adapter modules to checkpoint names"""
    tied: Tied = Tied.auto
    """when an adapter changes embeddings that lm_head shares: auto, untie, shared or refuse"""
    seed: int = 0
    """for everything random"""

    @abstractmethod
    def __call__(self, base: Checkpoint[Weight], adapter: Adapter) -> Checkpoint[Weight]: ...


@dataclass(frozen=True, kw_only=True)
class Save(Stage):
    writes: ClassVar[bool] = True  # into the workplace; False for what only looks
    needs_output: ClassVar[bool] = True

    output: Path
    """folder to create"""
    device: str
    """where tiles are decoded and merged"""
    memory_limit: int | None = None
    """bytes for tiles in flight, beyond the libraries"""

    def check(self) -> None:
        if self.writes:
            workplace.check(self.output)

    @abstractmethod
    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan: ...

    @abstractmethod
    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output: ...


@dataclass(frozen=True, kw_only=True)
class Verify(Stage):
    device: str
    """where models run"""
    memory_limit: int | None = None
    """bytes a model may take; default what is free"""

    @abstractmethod
    def __call__(self, output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Report: ...


SLOTS: dict[str, type[Stage]] = {
    "extract": Extract,
    "load": Load,
    "dequantize": Dequantize,
    "merge": Merge,
    "save": Save,
    "verify": Verify,
}
STAGES: dict[str, dict[str, type[Stage]]] = {slot: {} for slot in SLOTS}
CHOICES: dict[str, Callable[[Mapping[str, Any]], str]] = {}  # slot: what `slot=auto` means for a request

S = TypeVar("S", bound=Stage)


def stage(name: str) -> Callable[[type[S]], type[S]]:
    """Registers the class below it, under `name`, for the slot whose base class it extends."""

    def register(cls: type[S]) -> type[S]:
        [slot] = [slot for slot, base in SLOTS.items() if issubclass(cls, base)]
        if name in STAGES[slot]:
            raise ValueError(f"{slot}={name} is taken by {STAGES[slot][name].__module__}")
        STAGES[slot][name] = cls
        return cls

    return register


Choice = Callable[[Mapping[str, Any]], str]


def choice(base: type[Stage]) -> Callable[[Choice], Choice]:
    """Registers the function below it as `auto` of a slot: the root keys of a request to a stage's name."""

    def register(function: Choice) -> Choice:
        [slot] = [slot for slot, cls in SLOTS.items() if cls is base]
        CHOICES[slot] = function
        return function

    return register


def load_stages() -> None:
    """Imports our own stages and those of installed packages, which registers them."""
    package = import_module("pipeline.stages")
    for found in walk_packages(package.__path__, "pipeline.stages."):
        import_module(found.name)
    for entry in entry_points(group="pipeline.stages"):
        try:
            entry.load()
        except Exception as error:  # whatever somebody else's module raises
            owner = entry.dist.name if entry.dist else "an installed package"
            raise Refused(
                f"pipeline.stages: '{entry.name}' of {owner} cannot be loaded "
                f"({type(error).__name__}: {error}); mend or uninstall it"
            ) from error


def refuse_together(calls: Iterable[Callable[[], object]]) -> None:
    """Makes all calls; raises one Refused with every sentence that any of them raised."""
    refusals = []
    for call in calls:
        try:
            call()
        except Refused as refusal:
            refusals.append(refusal)
    if refusals:
        raise Refused.together(refusals)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    extract: Extract
    load: Load
    dequantize: Dequantize
    merge: Merge
    save: Save
    verify: Verify

    def chosen(self) -> dict[str, str]:
        """The name of the stage in each slot."""
        kinds = {cls: name for stages in STAGES.values() for name, cls in stages.items()}
        return {slot: kinds[type(getattr(self, slot))] for slot in SLOTS}

    def plan(self) -> Plan:
        """What `run` would do, from headers and configs; Refused, with every reason, if it would not."""
        stages = (self.extract, self.load, self.dequantize, self.merge, self.save, self.verify)
        refuse_together([stage.check for stage in stages])
        adapter = self.extract.plan()
        return self.save.plan(self.merge(self.dequantize(self.load()), adapter), adapter)

    def run(self) -> Report:
        adapter = self.extract()
        stored = self.load()
        base = self.dequantize(stored)
        merged = self.merge(base, adapter)
        output = self.save(merged, adapter)
        return self.verify(output, base, adapter)
