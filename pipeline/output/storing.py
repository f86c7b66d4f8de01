"""How the tiles of one weight become the bytes it is held as: rounded, by chance or not, or encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.codes.encoders.encoder import Encode, Encoded
from pipeline.ground.files import as_bytes
from pipeline.ground.metrics import (
    SAMPLED_ELEMENTS,
    Statistics,
    TileFacts,
    is_finite,
    is_sampled,
    tile_facts,
)
from pipeline.ground.rounding import Rounding, round_by_chance, round_to
from pipeline.merging.pieces import Merged
from pipeline.output.place import Place
from pipeline.simulated import Simulated
from pipeline.weight import Tile, Tiles

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 0.97  # of the delta: what nearest must keep for `auto` to leave it at that (spec: fidelity, 1)


class Made(NamedTuple):
    """A tile's bytes, and what it shows."""

    buffer: memoryview
    offset: int  # in the weight's first tensor
    facts: TileFacts | None = None
    overflown: bool = False
    noise: float = 0.0  # <O - T, O - T> where the tile is sampled
    sides: tuple[Tensor, ...] = ()


@dataclass
class Storing:
    """One weight while it is written: its tiles, and what of them is needed when all are done."""

    place: Place
    tiles: Tiles
    encode: Encode | None
    before: Tiles | None  # the 16-bit base of a weight that went through four bits
    made: list[Made] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)
    _looked: _Look | None = None

    def tile(self, start: int, stop: int, sampled: bool) -> Made:
        """Rows start:stop as they are stored. Any thread may call it."""
        tile = self.tiles(start, stop)
        if self.encode:
            return self._encoded(self.encode, tile, start, sampled)
        dtype, weight = self.place.slot.dtype, self.place.weight
        if tile.delta is None:
            stored = round_to(tile.value, dtype)
            lost = not is_finite(stored) and bool((tile.value.isfinite() & ~stored.isfinite()).any())
            return Made(as_bytes(stored), self._offset(start), overflown=lost)
        if self.by_chance:
            stored = round_by_chance(tile.value, dtype, self.place.stream, start * weight.num_columns)
        else:
            stored = round_to(tile.value, dtype)
        facts = tile_facts(stored, tile.base, round_to(tile.base, dtype), tile.delta, sampled)
        return Made(as_bytes(stored), self._offset(start), facts)

    def _offset(self, start: int) -> int:
        return start * (self.place.slot.length // self.place.weight.num_rows)

    def _encoded(self, encode: Encode, tile: Tile, start: int, sampled: bool) -> Made:
        encoder = self.place.encoder
        assert encoder
        stream = self.place.stream if tile.delta is not None and self.by_chance else None
        encoded = encode(tile.value.float(), start, stream)
        finite = is_finite(tile.value) and all(is_finite(s) for s in encoded.sides if s.element_size() > 1)
        sides = tuple(side.cpu() for side in encoded.sides) if encoder.gathers else ()
        made = Made(as_bytes(encoded.codes), encoder.offset(start), overflown=not finite, sides=sides)
        if tile.delta is None:
            return made
        if not sampled or not finite:
            facts = TileFacts(finite, False, bool(tile.delta.any()), None)
            return made._replace(facts=facts, overflown=False)
        facts, noise = self._facts(encode, tile, encoded, start, stream)
        return made._replace(facts=facts, noise=noise, overflown=False)

    def _facts(
        self, encode: Encode, tile: Tile, encoded: Encoded, start: int, stream: int | None
    ) -> tuple[TileFacts, float]:
        """Facts of the first rows of a tile that is stored as codes, and how far those are off, squared."""
        encoder, delta = self.place.encoder, tile.delta
        assert encoder and delta is not None
        rows = self._sampled_rows(start, start + len(tile.value)) - start
        stored = encoder.decoded(encoded, start)[:rows]
        unmerged = encoder.decoded(encode(tile.base[:rows].float(), start, stream), start)
        facts = tile_facts(stored, tile.base[:rows], unmerged, delta[:rows], True)
        few = max(SAMPLED_ELEMENTS // stored.shape[1], 1)
        error = (stored[:few] - tile.value[:few].float()).flatten()
        return facts._replace(moved=facts.moved or bool(delta.any())), float(error.dot(error))

    def _sampled_rows(self, start: int, stop: int) -> int:
        """Where the rows end that are looked at of a sampled tile: whole grains, enough for its sums."""
        rows, grain = max(SAMPLED_ELEMENTS // self.place.weight.num_columns, 1), self.place.grain
        return min(start + -(-rows // grain) * grain, stop)

    @property
    def by_chance(self) -> bool:
        """Whether the weight is rounded stochastically."""
        rounding = self.place.rounding
        if rounding is Rounding.auto:
            retained = self._look().retained
            return retained is not None and retained < ENOUGH
        return rounding is Rounding.stochastic

    def _look(self) -> _Look:
        """What a sample shows before the weight is written: the first who asks computes it."""
        with self._lock:
            if self._looked is None:
                self._looked = self._sample()
        return self._looked

    def _sample(self) -> _Look:
        import torch

        grid, kept, energy, shift = self.place.grid, 0.0, 0.0, 0.0
        for start, stop in (rows for n, rows in enumerate(grid) if is_sampled(n, len(grid))):
            end = self._sampled_rows(start, stop)
            tile = self.tiles(start, end)
            if tile.delta is None:
                continue
            wide = torch.float64 if tile.delta.dtype == torch.float64 else torch.float32
            D, W = tile.delta.to(wide).flatten(), tile.base.to(wide).flatten()
            energy += float(D.dot(D))
            if self.before:
                moved = self.before(start, end).value.to(wide).flatten() - W
                shift += float(moved.dot(moved))
            if self.place.rounding is Rounding.auto:
                kept += float((self._nearest(tile, start).to(wide).flatten() - W).dot(D))
        return _Look(kept / energy if energy else None, sqrt(shift / energy) if energy else None)

    def _nearest(self, tile: Tile, start: int) -> Tensor:
        """What nearest would store of a tile, in numbers."""
        encoder = self.place.encoder
        if self.encode and encoder:
            return encoder.decoded(self.encode(tile.value.float(), start, None), start)
        return round_to(tile.value, self.place.slot.dtype)

    def statistics(self) -> Statistics | None:
        """Of a merged weight, when all its tiles are made."""
        weight, facts = self.place.weight, [made.facts for made in self.made if made.facts]
        if not facts:
            return None
        found = Statistics.gathered(weight.num_rows * weight.num_columns, facts)
        energy = sum(f.moments.DD for f in facts if f.moments)
        off = sum(made.noise for made in self.made)
        return replace(
            found,
            rounding=(Rounding.stochastic if self.by_chance else Rounding.nearest).value,
            noise=sqrt(off / energy) if self.encode and energy else None,
            base_shift=self._look().base_shift if self.before else None,
        )

    def finish(self) -> Mapping[str, Tensor]:
        """The tensors beside the codes, when all tiles are made."""
        encoder = self.place.encoder
        return encoder.finish([made.sides for made in self.made]) if encoder else {}

    def done(self, made: Made) -> None:
        """Takes a tile, whose bytes are written by now; in the order of the tiles."""
        self.made.append(made)


class _Look(NamedTuple):
    retained: float | None  # by nearest
    base_shift: float | None


@contextmanager
def storing(place: Place, device: str) -> Iterator[Storing]:
    """The weight, open."""
    weight = place.weight
    base = weight.base if isinstance(weight, Merged) else None
    with ExitStack() as stack:
        tiles = stack.enter_context(weight.open(device))
        encode = stack.enter_context(place.encoder.open(device)) if place.encoder else None
        before = stack.enter_context(base.base.open(device)) if isinstance(base, Simulated) else None
        yield Storing(place, tiles, encode, before)
