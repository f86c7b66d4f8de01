"""What an output holds each weight as - numbers, codes made anew, or codes found - and where in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from pipeline.ground import tiles
from pipeline.ground.codes.encoders.encoder import Encoder, Part
from pipeline.ground.report import Action, PlannedWeight
from pipeline.ground.rounding import Rounding, takes_chance
from pipeline.ground.shards import Entry, Slot
from pipeline.merging.pieces import FromAdapter, Merged
from pipeline.simulated import Simulated
from pipeline.weight import Weight


@dataclass(frozen=True, slots=True)
class Held:
    """Codes that stand in a file already; `copied` if they are the base's very own.

    Copied ones that have an encoder may as well be what it makes of the base's values.
    """

    describe: str
    entries: tuple[Entry, ...]
    encoder: Encoder | None = None  # that makes such codes
    copied: bool = True


Form = str | Encoder | Held  # numbers of a dtype, codes made anew, or codes found
FormOf = Callable[[Weight], Form]


def by_chance(form: Form) -> bool:
    """Whether rounding by chance means anything for what a weight is stored as."""
    if isinstance(form, str):
        return takes_chance(form)
    return isinstance(form, Encoder) and form.by_chance


def parts_of(weight: Weight, form: Form) -> list[Part]:
    """The tensors that hold a weight; codes first."""
    if isinstance(form, str):
        return [Part(weight.name, form, weight.shape)]
    if isinstance(form, Encoder):
        return list(form.parts)
    return [Part(entry.name, entry.dtype, entry.shape) for entry in form.entries]


@dataclass(frozen=True, slots=True)
class Place:
    """A weight, and the bytes of a shard that it will fill; `others` are the tensors beside its codes."""

    weight: Weight
    form: Form
    slot: Slot
    others: tuple[Slot, ...] = ()
    rounding: Rounding = Rounding.nearest
    stream: int = 0  # of the bits that rounding by chance takes

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.slot, *self.others)

    @property
    def encoder(self) -> Encoder | None:
        """What makes its codes, if those are made anew."""
        return self.form if isinstance(self.form, Encoder) else None

    @property
    def action(self) -> Action:
        if isinstance(self.weight, Merged):
            return Action.merged
        if isinstance(self.weight, FromAdapter):
            return Action.saved
        if isinstance(self.form, Encoder):
            return Action.encoded
        if isinstance(self.form, Held):
            return Action.copied if self.form.copied else Action.encoded
        if isinstance(self.weight, Simulated):
            return Action.simulated
        if self.weight.source is None:
            return Action.decoded
        return Action.copied if self.slot.dtype == self.weight.dtype else Action.cast

    @property
    def grain(self) -> int:
        """Rows that must stay together, to be computed and to be encoded."""
        return lcm(self.weight.grain, self.encoder.grain if self.encoder else 1)

    @property
    def grid(self) -> list[tuple[int, int]]:
        """The row ranges in which it is computed."""
        return list(tiles.grid(self.weight.num_rows, self.weight.num_columns, self.grain))

    @property
    def tile_bytes(self) -> int:
        """Bytes that its largest tile needs while it is computed: raw, base, delta, value, stored."""
        weight = self.weight
        each = weight.bytes_per_element if isinstance(weight, Merged) else 4 * 3 + 4
        rows = min(tiles.tile_rows(weight.num_columns, self.grain), weight.num_rows)
        return rows * weight.num_columns * (each + (16 if self.encoder else 0))

    @property
    def state_bytes(self) -> int:
        """Bytes that it holds beside its tiles: deltas, scales, packed codes."""
        return self.weight.state_bytes + (self.encoder.state_bytes if self.encoder else 0)

    def planned(self) -> PlannedWeight:
        """This weight for the plan."""
        form = self.form
        return PlannedWeight(
            name=self.weight.name,
            shape=self.weight.shape,
            dtype=form if isinstance(form, str) else form.describe,
            num_bytes=sum(slot.length for slot in self.slots),
            action=self.action,
            source=self.weight.stored_as,
            deltas=_deltas(self.weight),
            codes=() if isinstance(form, str) else tuple(parts_of(self.weight, form)),
            encoder=form.encoder if isinstance(form, Held) else self.encoder,
        )


def _deltas(weight: Weight) -> tuple[str, ...]:
    if isinstance(weight, FromAdapter):
        return ("saved whole",)
    if isinstance(weight, Merged):
        return (*_deltas(weight.base), *(placed.describe() for placed in weight.placed))
    return ()
