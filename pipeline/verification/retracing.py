"""A merge retraced: base + delta of its weights in float64, from the adapters' files alone.

Own reader, own map of names (`ground/retraced`), a plain formula for each kind (`ground/formulas`). Shared
with the merge are the request, the decoded rows of the base, and the generator of DARE's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import fsum, prod
from typing import TYPE_CHECKING

from pipeline.ground.combining import Combination
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.formulas.combinations import combined
from pipeline.ground.formulas.module import Rows
from pipeline.ground.formulas.values import held
from pipeline.ground.reference import size_of_terms
from pipeline.ground.retraced import ties
from pipeline.ground.retraced.adapter import Adapter as Opened
from pipeline.ground.retraced.adapter import Piece, Told, opened
from pipeline.ground.retraced.pieces import Area, area_of, change_on, scaled
from pipeline.ground.retraced.weights import Weights
from pipeline.ground.selecting import Spot
from pipeline.ground.tiles import as_matrix
from pipeline.weight import Adapter, Checkpoint, Output, Part, Tiles, Weight

if TYPE_CHECKING:
    from torch import Tensor

Terms = Callable[[int, int], "tuple[Tensor, Tensor, Tensor]"]  # of rows: base, delta, what slack is taken of


@dataclass(frozen=True)
class Traced:
    """A weight that adapters change: what it was, each adapter's factor and pieces.

    What it was is the base's weight, or what an adapter holds in its place.
    """

    name: str
    shape: tuple[int, ...]
    base: Weight | Piece
    pieces: Mapping[int, Sequence[Piece]]
    factors: Mapping[int, float]
    combination: Combination | None

    @property
    def num_rows(self) -> int:
        return as_matrix(self.shape)[0]

    @property
    def num_columns(self) -> int:
        return as_matrix(self.shape)[1]

    @contextmanager
    def before(self) -> Iterator[Rows]:
        """Rows of what it was, in any float dtype."""
        if isinstance(self.base, Piece):
            saved, fold = held(self.base.module), prod(self.shape[1:-1])

            def rows(start: int, stop: int) -> Tensor:
                found = saved(start // fold, -(-stop // fold)).reshape(-1, self.num_columns)
                return found[start % fold :][: stop - start]

            yield rows
        else:
            with self.base.open("cpu") as tiles:
                yield rows_of(self.base, tiles)

    @contextmanager
    def open(self) -> Iterator[Terms]:
        """Terms of any rows."""
        with self.before() as base:
            parts = [_summed(own, base, self.num_columns) for own in self.pieces.values()]
            factors = [self.factors[number] for number in self.pieces]
            if self.combination:
                rows = combined([_delta(p) for p in parts], self._spots(), self.num_rows, self.combination)

            def terms(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
                W = base(start, stop)
                if self.combination:
                    delta = rows(start, stop)
                    return W, delta, size_of_terms(W, delta)
                found = [part(start, stop) for part in parts]
                delta = _sum([scaled(D, f) for (D, _), f in zip(found, factors, strict=True)])
                sizes = [scaled(s, abs(f)) for (_, s), f in zip(found, factors, strict=True) if s is not None]
                return W, delta, _sum(sizes) if len(sizes) == len(found) else size_of_terms(W, delta)

            yield terms

    def _spots(self) -> list[Spot]:
        return [
            Spot(self.name, number, self.factors[number], self.num_columns, _reached(own))
            for number, own in self.pieces.items()
        ]


@dataclass(frozen=True)
class Retraced:
    """What the adapters' files come to: weights by the output's names, and modules without a weight.

    What an adapter holds whole and nothing changes has no pieces.
    """

    weights: Mapping[str, Traced]
    homeless: Sequence[str]


def rows_of(weight: Weight, tiles: Tiles) -> Rows:
    """Any rows of a weight, by tiles that begin where it can be cut."""
    grain = weight.grain

    def rows(start: int, stop: int) -> Tensor:
        first, end = start // grain * grain, min(-(-stop // grain) * grain, weight.num_rows)
        return tiles(first, end).value[start - first : stop - first]

    return rows


Summed = Callable[[int, int], "tuple[Tensor, Tensor | None]"]  # of rows: delta, and its size where it has one


def _summed(pieces: Sequence[Piece], base: Rows, num_columns: int) -> Summed:
    """The pieces of one adapter, wherever they lie in the weight; 0 where none does."""
    import torch

    placed = [(area_of(piece), change_on(piece, base)) for piece in pieces]

    def gathered(start: int, stop: int, parts: Sequence[tuple[Area, Rows]]) -> Tensor:
        [(first, alone), *more] = parts
        if not more and first.row <= start and stop <= first.stop and first[2:] == (0, num_columns):
            return alone(start, stop)
        total = torch.zeros(stop - start, num_columns, dtype=torch.float64)
        for area, rows in parts:
            low, high = max(start, area.row), min(stop, area.stop)
            if low < high:
                total[low - start : high - start, area.column : area.end] += rows(low, high)
        return total

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        delta = gathered(start, stop, [(area, change.rows) for area, change in placed])
        sizes = [(area, change.size) for area, change in placed if change.size]
        return delta, gathered(start, stop, sizes) if len(sizes) == len(placed) else None

    return rows


def _delta(summed: Summed) -> Rows:
    return lambda start, stop: summed(start, stop)[0]


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _reached(pieces: Sequence[Piece]) -> int:
    return sum(area.size for area in {area_of(piece) for piece in pieces})


@contextmanager
def retraced(output: Output, base: Checkpoint[Weight], adapter: Adapter) -> Iterator[Retraced]:
    """All weights that the adapters change or hold; their files are open meanwhile.

    None where a stage of others merged, which does not tell what it was asked.
    """
    asked = output.merged.merging
    if asked is None:
        yield Retraced({}, [])
        return
    total = fsum(part.weight for part in adapter.parts) if asked.normalize else 1.0
    bases = {weight.name: weight for weight in base.weights}
    with ExitStack() as stack:
        kind = base.config.model_type
        files = [(n, own) for n, part in enumerate(adapter.parts) for own in _opened(part, kind, stack)]
        files, bases = _settled(files, bases, output, base.config.tied, asked.tied.value)
        shapes = {name: weight.shape for name, weight in bases.items()}
        placed = _Placed(Weights(shapes, kind, asked.renames))
        for number, own in files:
            placed.add(number, own, bases)
        factors = {n: asked.factor * part.weight / total for n, part in enumerate(adapter.parts)}
        weights = {
            name: Traced(
                name,
                shapes[name],
                placed.whole.get(name) or bases[name],
                placed.pieces.get(name, {}),
                factors,
                asked.combination,
            )
            for name in {**placed.whole, **placed.pieces}
        }
        yield Retraced(weights, placed.homeless)


def _opened(part: Part, model_type: str | None, stack: ExitStack) -> Iterator[Opened]:
    """The adapter, and what it was before training where that is taken off."""
    told = Told(part.told.expert_major, part.told.out_proj_times or 1)
    yield stack.enter_context(opened(part.origin.folder, 1.0, told, model_type))
    if part.initial:
        yield stack.enter_context(opened(part.initial, -1.0, told, model_type))


Numbered = list[tuple[int, Opened]]  # each with the number of its adapter


def _settled(
    files: Numbered, bases: dict[str, Weight], output: Output, tied: bool | None, policy: str
) -> tuple[Numbered, dict[str, Weight]]:
    """Each tensor on one side of embeddings and head; where they part, the head was the embeddings."""
    tie = ties.tie_of({name: weight.shape for name, weight in bases.items()}, tied)
    if tie is None:
        return files, bases
    embeddings = bases[tie.embeddings]

    def is_base(own: Opened, key: str) -> bool:
        """Of embeddings that are plain numbers."""
        saved = own.file.get_tensor(key)
        if embeddings.source is None or saved.shape != embeddings.shape:
            return False
        with embeddings.open("cpu") as tiles:
            return bool((tiles(0, embeddings.num_rows).value == saved).all())

    written = [w.name for w in output.merged.weights if ties.is_head(w.name)]
    head = tie.head or next(iter(written), "lm_head.weight")
    settled, parted = ties.settle([own for _, own in files], tie, policy, head, is_base)
    numbered = [(number, own) for (number, _), own in zip(files, settled, strict=True)]
    return numbered, {**bases, head: embeddings} if parted else bases


@dataclass
class _Placed:
    """What is held whole in a weight's place, and by weight and adapter the pieces that change it."""

    weights: Weights
    whole: dict[str, Piece] = field(default_factory=dict)
    pieces: dict[str, dict[int, list[Piece]]] = field(default_factory=dict)
    homeless: list[str] = field(default_factory=list)

    def add(self, number: int, own: Opened, bases: Mapping[str, Weight]) -> None:
        """All of one adapter: first what it holds, whose sizes the rest is made for."""
        for piece in own.saved(self.weights):
            name = piece.place.weight
            if name not in bases or _is_of_its_own(piece, bases[name]):
                self.whole[name] = piece
                self.weights.shapes[name] = piece.module.shape("")
            else:
                self._of(name, number).append(piece)
        changes, homeless = own.changes(self.weights)
        self.homeless += homeless
        for piece in changes:
            name = piece.place.weight
            pieces = self._of(name, number)
            under = [p for p in pieces if p.is_saved and p.place.dims == self.weights.shapes[name]]
            if under:  # it was trained on these values
                self.whole[name] = under[0]
                pieces.remove(under[0])
            pieces.append(piece)

    def _of(self, name: str, number: int) -> list[Piece]:
        return self.pieces.setdefault(name, {}).setdefault(number, [])


def _is_of_its_own(piece: Piece, base: Weight) -> bool:
    """Whether it is no change of the base's: in a size of its own, or no floats."""
    [key] = piece.module.keys.values()
    stored = piece.module.file.get_slice(key).get_dtype()
    resized = piece.place.dims == base.shape and prod(piece.module.shape("")) != prod(base.shape)
    return resized or not {stored, base.dtype} <= DENSE_FLOATS
