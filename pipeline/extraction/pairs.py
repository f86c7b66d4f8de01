"""The weights of a fine-tune beside those of its base, whatever their names, dtypes and shards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from pipeline.ground import tiles
from pipeline.ground.canonical_names import canonical
from pipeline.ground.errors import Refused
from pipeline.merging.pieces import Merged
from pipeline.merging.tying import EMBEDDINGS, HEADS
from pipeline.weight import Checkpoint, Weight

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[int, int], "tuple[Tensor, Tensor, Tensor]"]  # rows(start, stop): (base, tuned, tuned - base)

# What old files hold though the model computes it.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.position_ids|\.masked_bias)")


@dataclass(frozen=True)
class Pair:
    """A weight of the fine-tune and the base's that it was made from; `name` is the base's, if it has one."""

    name: str
    base: Weight
    tuned: Weight

    @property
    def resized(self) -> bool:
        """Whether the fine-tune knows another number of tokens."""
        return self.base.shape != self.tuned.shape

    @property
    def grain(self) -> int:
        return lcm(self.base.grain, self.tuned.grain)

    def grid(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Row ranges of tiles that cover start:stop."""
        rows = tiles.tile_rows(self.tuned.num_columns, self.grain)
        end = self.tuned.num_rows if stop is None else stop
        begin = start // self.grain * self.grain
        while begin < end:
            after = min(begin + rows, -(-end // self.grain) * self.grain, self.tuned.num_rows)
            yield begin, after
            begin = after

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        """rows(start, stop): (base, tuned, tuned - base), the difference in float32.

        Of a fine-tune that is a merge to come, the difference is what the merge would add, unrounded.
        """
        import torch

        added = isinstance(self.tuned, Merged)
        with self.base.open(device) as of_base, self.tuned.open(device) as of_tuned:

            def rows(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
                tile = of_tuned(start, stop)
                if added:
                    assert tile.delta is not None
                    return tile.base, tile.value, tile.delta.float()
                before = of_base(start, stop).value
                if before.dtype == tile.value.dtype and torch.equal(before, tile.value):
                    return before, tile.value, torch.zeros_like(before, dtype=torch.float32)
                wide = torch.float64 if torch.float64 in (before.dtype, tile.value.dtype) else torch.float32
                return before, tile.value, (tile.value.to(wide) - before.to(wide)).float()

            yield rows


def paired(base: Checkpoint[Weight], tuned: Checkpoint[Weight]) -> tuple[Pair, ...]:
    """Every weight of both; Refused, with every reason, where they are not the same model."""
    if base.config.model_type != tuned.config.model_type:
        theirs, ours = tuned.config.model_type, base.config.model_type
        raise Refused(f"finetune: is a model of type {theirs!r}, but the base is one of type {ours!r}")
    held, wanted = _by_canonical(base), _by_canonical(tuned)
    _share_embeddings(held, wanted)
    wrong = []
    for name, weight in held.items():
        if name not in wanted and not _BUFFERS.fullmatch(weight.name):
            wrong.append(f"finetune: has no {weight.name}, which the base has")
    for name, weight in wanted.items():
        if name not in held and not _BUFFERS.fullmatch(weight.name):
            wrong.append(f"finetune: has {weight.name}, which the base lacks")
    if len(wrong) > 1:
        wrong = [f"{wrong[0]} ({len(wrong)} weights are on one side only)"]
    pairs = [
        Pair(wanted[name].name if _is_shared(weight, wanted[name]) else weight.name, weight, wanted[name])
        for name, weight in held.items()
        if name in wanted
    ]
    misfits = [p for p in pairs if p.resized and not _is_vocabulary(p)]
    if misfits:
        first = misfits[0]
        wrong.append(
            f"finetune: {first.name} is {list(first.tuned.shape)}, the base's {list(first.base.shape)} "
            f"({len(misfits)} shapes differ)"
        )
    if wrong:
        raise Refused(*wrong)
    return tuple(pairs)


def _by_canonical(checkpoint: Checkpoint[Weight]) -> dict[str, Weight]:
    """The weights by their canonical names, or by their own where two have the same canonical one."""
    found: defaultdict[str, list[Weight]] = defaultdict(list)
    for weight in checkpoint.weights:
        found[canonical(weight.name)].append(weight)
    return {
        name if len(weights) == 1 else weight.name: weight
        for name, weights in found.items()
        for weight in weights
    }


def _share_embeddings(ours: dict[str, Weight], theirs: dict[str, Weight]) -> None:
    """Gives a side that ties lm_head to its embeddings the other side's lm_head."""
    for one, other in ((ours, theirs), (theirs, ours)):
        for name in other.keys() - one.keys():
            if name.rpartition(".")[0].rpartition(".")[2] in HEADS:
                embeddings = [
                    w for n, w in one.items() if n.split(".")[-2:-1] and n.split(".")[-2] in EMBEDDINGS
                ]
                if len(embeddings) == 1:
                    one[name] = embeddings[0]


def _is_shared(base: Weight, tuned: Weight) -> bool:
    """Whether the base's weight only stands in for the fine-tune's own lm_head."""
    return _layer(tuned) in HEADS and _layer(base) not in HEADS


def _layer(weight: Weight) -> str:
    return weight.name.rpartition(".")[0].rpartition(".")[2]


def _is_vocabulary(pair: Pair) -> bool:
    fits = pair.base.shape[1:] == pair.tuned.shape[1:]
    return fits and bool({_layer(pair.base), _layer(pair.tuned)} & {*EMBEDDINGS, *HEADS})
