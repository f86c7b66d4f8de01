"""Inputs of the modules that get a low rank, as the fine-tune sees them while it reads a text.

The fine-tune and not the base is run: its outputs are to be kept, and base + adapter comes near its inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.extraction.parameters import Parameter
from pipeline.ground import logits, workplace
from pipeline.ground.calibration import (
    EVERY,
    HELD_ROWS,
    SEQUENCE,
    bytes_needed,
    cut,
    num_fitted,
    watch,
)
from pipeline.ground.device import memory_free
from pipeline.ground.digests import sha256
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.files import File
from pipeline.ground.libraries import quiet
from pipeline.ground.model_modules import Kind
from pipeline.ground.progress import working
from pipeline.ground.report import Finding
from pipeline.ground.sidefiles import chosen, write_side_files
from pipeline.ground.units import show_bytes
from pipeline.ground.whitening import Inputs, put_aside
from pipeline.output.stream import num_workers
from pipeline.verification.whole import Whole
from pipeline.weight import Checkpoint, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """The text that is read, and how far its moments are trusted."""

    path: str
    tokens: int
    shrinkage: float

    @cached_property
    def file(self) -> File:
        return File.at(Path(self.path).expanduser())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that an extraction depends on beside the checkpoints."""
        return {"text": sha256(self.file), "tokens": self.tokens, "shrinkage": self.shrinkage}

    def check(self) -> None:
        """Refused for settings that are out of bounds, and a text that cannot be read."""
        if not 0 < self.shrinkage <= 1:
            raise Refused(f"extract.shrinkage: {self.shrinkage} is not a share above 0 and up to 1")
        if self.tokens < 1:
            raise Refused(f"extract.calibration_tokens: {self.tokens} is not a number of tokens")
        self.text()

    def text(self) -> str:
        """As much of it as those tokens can be."""
        try:
            with self.file.path.open(encoding="utf-8") as file:
                text = file.read(self.tokens * logits.CHARACTERS)
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"extract.calibration: '{self.path}' cannot be read as text ({error})") from None
        if not text.strip():
            raise Refused(f"extract.calibration: '{self.path}' is empty; give a file of text")
        return text


@dataclass(frozen=True)
class Calibrated:
    """What the parameters see, by name; what is decomposed by its weights alone, with the reason."""

    inputs: Mapping[str, Inputs]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Calibrating:
    """One text read by one fine-tune, for the parameters of an extraction."""

    asked: Calibration
    base: Checkpoint[Weight]
    tuned: Checkpoint[Weight]
    parameters: Sequence[Parameter]
    device: str
    memory: int | None = None

    @cached_property
    def widths(self) -> dict[str, int]:
        """Modules that multiply their input with a matrix, and of how many features it is."""
        columns = {Kind.linear: 1, Kind.conv1d: 0}
        kinds = [(p, p.place.kind) for p in self.parameters]
        return {p.module: p.matrix[columns[kind]] for p, kind in kinds if kind in columns}

    def check(self, output: Path, dry_run: bool) -> None:
        """Refused where there is no room, or the text is too short; a dry run does not read it."""
        if not self.widths:
            raise Refused("extract.calibration: no module that gets a low rank is linear; leave it out")
        needed = sum(4 * n * n + 4 * n * HELD_ROWS for n in self.widths.values())
        if needed > (free := workplace.free_for(output)):
            raise Refused(
                f"extract.calibration: up to {show_bytes(needed)} are put aside beside '{output}', but its "
                f"disk has {show_bytes(free)} free"
            )
        self._device()
        if not dry_run:
            self._read  # noqa: B018  refused now, not when the run has begun

    @property
    def most_memory(self) -> int:
        """Bytes, as if no two modules shared their inputs."""
        most = self._model_bytes + sum(bytes_needed(n) for n in self.widths.values())
        return min(most, self.memory or most)

    @cached_property
    def _model_bytes(self) -> int:
        return int(1.2 * 4 * sum(prod(weight.shape) for weight in self.tuned.weights))

    def _device(self) -> str:
        """Where the fine-tune is run; Refused where it fits nowhere."""
        widest = max(self.widths.values())
        needed = self._model_bytes + bytes_needed(widest) + 8 * widest * widest  # with its factor
        for place in dict.fromkeys((self.device, "cpu")):
            free = self.memory or memory_free(place)
            if needed <= free:
                return place
        raise Refused(
            f"extract.calibration: the fine-tune in float32 and what it sees take {show_bytes(needed)} of "
            f"memory, but {show_bytes(free)} are free; leave it out, or use a larger machine"
        )

    @cached_property
    def _read(self) -> tuple[Any, Tensor]:
        """The model's class, and the text in its tokens, (sequences, length); Refused if too short."""
        with TemporaryDirectory() as told, quiet():
            config_file = Path(told) / "config.json"
            config_file.write_text(self.tuned.config.text(self.tuned.config_edits), "utf-8")
            write_side_files(Path(told), chosen(self.base.side_files, self.tuned.side_files))
            try:
                config, tokenizer, cls = logits.prepare(Path(told))
            except (logits.CannotCompare, logits.MergedDoesNotRun) as reason:
                raise Refused(f"extract.calibration: the fine-tune cannot be run here ({reason})") from None
            if tokenizer is None:
                raise Refused("extract.calibration: the fine-tune has no tokenizer that loads, to read with")
            text = self.asked.text()
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: self.asked.tokens]
        size = getattr(config.get_text_config(), "vocab_size", 1 << 62)
        if len(ids) < min(self.asked.tokens, len(text) // logits.CHARACTERS) or max(ids, default=0) >= size:
            raise Refused("extract.calibration: the fine-tune's tokenizer does not fit its model")
        sequences = cut(ids, logits.longest(config, SEQUENCE))
        self._check_length(len(ids), *sequences.shape)
        return cls, sequences

    def _check_length(self, num_ids: int, count: int, length: int) -> None:
        """Refused where a module that sees every token has more features than tokens are fitted to."""
        widest = max(self.widths, key=lambda name: self.widths[name])
        least = EVERY
        while num_fitted(least, length) < self.widths[widest]:
            least += 1
        if count < least:
            how = "give more text" if num_ids < self.asked.tokens else "raise extract.calibration_tokens"
            raise Refused(
                f"extract.calibration: {num_ids} tokens of '{self.asked.path}' are too few for {widest} with "
                f"its {self.widths[widest]} inputs; {least * length} are needed, one of {EVERY} to judge "
                f"by: {how}"
            )

    def __call__(self, scratch: Path) -> Calibrated:
        """Runs the fine-tune over the text, and puts aside what its modules see."""
        folder, (cls, sequences) = scratch / "inputs", self._read
        folder.mkdir(parents=True)
        try:
            inputs = self._inputs(cls, sequences, self._device(), folder)
        except PipelineError:
            raise
        except Exception as error:  # whatever transformers raises about a model that reads more than text
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise PipelineError(f"extract.calibration: the fine-tune does not run ({said})") from error
        gc.collect()  # the model
        names = {p.module: p.name for p in self.parameters}
        found = {names[module]: one for module, one in inputs.items() if one}
        few = [module for module, one in inputs.items() if one is None]
        return Calibrated(found, tuple(self._without(found, few)))

    def _inputs(self, cls: Any, sequences: Tensor, device: str, folder: Path) -> dict[str, Inputs | None]:
        """By module; None where it saw too little."""
        with quiet(), working("calibrating: loading the fine-tune"):
            model = Whole().base(self.tuned, self.tuned)(cls).eval().to(device)
        model.config.use_cache = False
        there = dict(model.named_modules())
        sees = {module: n for module, n in self.widths.items() if module in there}
        room = self.memory - self._model_bytes if self.memory else memory_free(device) // 2
        workers = num_workers() if device == "cpu" else 1
        found: dict[str, Inputs | None] = {}
        for number, (modules, moments) in enumerate(watch(model, sees, sequences, workers, room)):
            enough = moments.rows >= len(moments.C) and any(len(part) for part in moments.held)
            one = put_aside(folder / str(number), moments, self.asked.shrinkage) if enough else None
            found |= dict.fromkeys(modules, one)
        return found

    def _without(self, found: Mapping[str, Inputs], few: Sequence[str]) -> Iterator[Finding]:
        """What is decomposed by its weights alone after all."""
        blind = [p for p in self.parameters if p.name not in found and p.module not in few]
        if few:
            yield Finding(
                f"{few[0]} saw fewer inputs of the calibration text than they have features ({len(few)} "
                "modules); decomposed by weights alone"
            )
        if blind:
            kinds = ", ".join(sorted({p.place.kind.value for p in blind}))
            yield Finding(
                f"{blind[0].name} has no inputs to weigh ({len(blind)} parameters: {kinds}); decomposed by "
                "weights alone"
            )
