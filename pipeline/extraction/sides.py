"""The two sides of an extraction: base and fine-tune, paired, compared, and placed in the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.dequantizing import dense
from pipeline.extraction.differences import Change, compare
from pipeline.extraction.identity import key, surroundings
from pipeline.extraction.pairs import Pair, paired
from pipeline.extraction.parameters import Parameter, parameters
from pipeline.ground import workplace
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.model_modules import Model, in_memory
from pipeline.ground.spool import told
from pipeline.loading import load_checkpoint
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.merging.plan import merged
from pipeline.weight import Adapter, Checkpoint, Merging, Weight


@dataclass(frozen=True)
class Sides:
    """What is compared; each part is read when it is first asked for, and then kept."""

    base_model: str
    finetune: str | None
    adapter: Callable[[], Adapter]  # the adapters that are decomposed where there is no fine-tune
    names: dict[str, str]
    output: Path
    device: str
    dry_run: bool

    @property
    def tuned_key(self) -> str:
        """The recipe's key that the tuned weights come of."""
        return "finetune" if self.finetune else "adapter"

    @cached_property
    def base(self) -> Checkpoint[Weight]:
        return dense(load_checkpoint("base_model", self.base_model, download=not self.dry_run))

    @cached_property
    def tuned(self) -> Checkpoint[Weight]:
        """The fine-tune; of adapters, the merge of them into the base, to come."""
        if self.finetune:
            return dense(load_checkpoint("finetune", self.finetune, download=not self.dry_run))
        adapter = self.adapter()
        found = merged(self.base, adapter, Merging(renames=self.names), "F32")
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
    def pairs(self) -> tuple[Pair, ...]:
        return paired(self.base, self.tuned)

    @cached_property
    def changes(self) -> dict[str, Change] | None:
        """The comparing pass, or what an earlier run saw; a dry run reads no weight."""
        if self.dry_run:
            return None
        if seen := told(workplace.standing(self.output) / self.compared):
            return {name: Change(*change) for name, change in seen.items()}
        return dict(compare(self.pairs, self.device, self.tuned_key))

    @property
    def files(self) -> tuple[File, ...]:
        """All that both sides are read from."""
        return (*self.base.files, *self.tuned.files)

    @cached_property
    def inputs(self) -> str:
        return surroundings(self.files, self.device)

    @cached_property
    def compared(self) -> str:
        """The key of what the comparing pass sees."""
        return key(self.inputs, *self.pairs)

    @cached_property
    def model(self) -> Model | None:
        """What transformers makes of the config; a dry run does not ask it."""
        return None if self.dry_run else in_memory(self.base.config.read())

    @cached_property
    def parameters(self) -> tuple[tuple[Parameter, ...], tuple[Pair, ...]]:
        """(parameters of the model, weights that have no place in it)."""
        return parameters(self.pairs, self.model, self.base.config.model_type)


def saved_whole(pairs: tuple[Pair, ...]) -> list[str]:
    """The modules that adapters hold whole; a trained bias is none."""
    return [
        pair.name.rpartition(".")[0]
        for pair in pairs
        if not pair.name.endswith(".bias") and (isinstance(pair.tuned, FromAdapter) or _holds_saved(pair))
    ]


def _holds_saved(pair: Pair) -> bool:
    return isinstance(pair.tuned, Merged) and any(isinstance(p.delta, Saved) for p in pair.tuned.placed)
