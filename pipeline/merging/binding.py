"""Every delta of an adapter bound to the weights that it changes: each used wholly, once, or refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.ground.deltas.delta import UNKNOWN, Delta
from pipeline.ground.deltas.experts import Experts, settled
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.dtypes import DENSE_FLOATS
from pipeline.ground.errors import Refused, each_once
from pipeline.ground.module_names import Names, Site
from pipeline.ground.names import is_conv1d, is_conv1d_layer, nearest
from pipeline.merging.pieces import FromAdapter, Placed
from pipeline.weight import Adapter, Checkpoint, Part, Weight

# Models whose fused experts lie as (experts, in, out).
_TURNED_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "llama4", "llama4_text"})


@dataclass
class Bound:
    """What an adapter does to a checkpoint: pieces by weight, and weights that only the adapter has."""

    placed: dict[str, list[Placed]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[str, FromAdapter] = field(default_factory=dict)
    homeless: list[Delta] = field(default_factory=list)  # fits nothing that the files hold


def bind(base: Checkpoint[Weight], adapter: Adapter, factor: float, renames: Mapping[str, str]) -> Bound:
    """All deltas of all adapters, with their factors; Refused, with every reason, for what does not fit."""
    weights = {weight.name: weight for weight in base.weights}
    names = Names({weight.name: weight.shape for weight in base.weights}, renames)
    together, wrong = Bound(), list(_unused_renames(adapter, renames))
    for number, part in enumerate(adapter.parts):
        bound, now = Bound(), dict(weights)
        for delta in part.deltas:
            try:
                _bind(base.config.model_type, now, names, part, delta, bound)
            except Refused as refusal:
                wrong += refusal.sentences
        every = [piece.delta for pieces in bound.placed.values() for piece in pieces]
        for name, pieces in bound.placed.items():
            own = [
                replace(piece, delta=piece.delta.among(every), factor=factor * part.weight, part=number)
                for piece in pieces
            ]
            own = _saved_first(weights[name], own, bound)
            others = together.placed[name]
            if reason := _conflict(weights[name], [*others, *own], len(others)):
                wrong.append(f"adapter: {reason}")
            together.placed[name] = [*others, *own]
        if bound.whole and factor * part.weight != 1:
            wrong.append(
                f"adapter: holds {min(bound.whole)} whole, in a size of its own; it cannot be taken "
                f"{factor * part.weight:g} times"
            )
        if both := bound.whole.keys() & together.whole.keys():
            wrong.append(f"adapter: two hold {min(both)} whole; only one can take its place")
        together.whole |= bound.whole
        together.homeless += bound.homeless
        elsewhere = {n for n, placed in together.placed.items() if {p.part for p in placed} - {number}}
        changed = {name for name, placed in bound.placed.items() if placed}
        if twice := (bound.whole.keys() & elsewhere) | (
            (together.whole.keys() - bound.whole.keys()) & changed
        ):
            wrong.append(
                f"adapter: one holds {min(twice)} whole and another changes it, whose order would matter"
            )
    if wrong:
        raise Refused(*each_once(wrong))
    return together


def _unused_renames(adapter: Adapter, renames: Mapping[str, str]) -> Iterator[str]:
    modules = {delta.module for delta in adapter.deltas}
    for old in renames:
        if not any(module == old or module.startswith(f"{old}.") for module in modules):
            yield f"names: no module of the adapter is '{old}' or begins with '{old}.'"


def _bind(
    model_type: str | None,
    weights: dict[str, Weight],
    names: Names,
    part: Part,
    delta: Delta,
    bound: Bound,
) -> None:
    """Places one delta; what is held whole stands in `weights` for those that come after it."""
    sites = _sites(names, delta)
    if not sites:
        without = delta.parameter == "bias" and names.find(delta.module, "weight")
        if without and not delta.optional:
            raise _misfit(delta, f"has a bias, but the base has none beside {without[0].weight}")
        if not without:
            bound.homeless.append(delta)
    elif isinstance(delta, Saved) and (whole := _whole(weights[sites[0].weight], delta)):
        bound.whole[whole.name] = weights[whole.name] = whole
    else:
        for name, piece in _pieces(model_type, weights, delta, sites, part):
            bound.placed[name].append(piece)


def unknown_modules(base: Checkpoint[Weight], homeless: Sequence[Delta]) -> str:
    """The sentence for deltas that no weight of the base answers."""
    first = f"{homeless[0].module}.{homeless[0].parameter}"
    modules = len({delta.module for delta in homeless})
    return (
        f"adapter: no weight {first} in {base.origin.asked}{nearest(first, [w.name for w in base.weights])} "
        f"({modules} of its modules match nothing; names={{from: to}} renames modules)"
    )


def _sites(names: Names, delta: Delta) -> tuple[Site, ...]:
    if sites := names.find(delta.module, delta.parameter):
        return sites
    if delta.parameter == "weight":  # a MultiheadAttention keeps its q, k and v in one parameter
        return names.find(delta.module, "in_proj_weight")
    return ()


def _whole(weight: Weight, delta: Saved) -> FromAdapter | None:
    """The weight as the adapter holds it, where the base's has another size or is no float."""
    if weight.dtype not in DENSE_FLOATS or delta.entry.dtype not in DENSE_FLOATS:
        if weight.dtype != delta.entry.dtype or weight.shape != delta.shape:
            raise Refused(
                f"adapter: '{delta.module}' holds {delta.entry.dtype} {list(delta.shape)}, but "
                f"{weight.name} is {weight.dtype} {list(weight.shape)}"
            )
        return FromAdapter(weight.name, delta.shape, weight.dtype, delta.entry)
    same_width = len(weight.shape) == len(delta.shape) == 2 and weight.shape[1] == delta.shape[1]
    if same_width and weight.shape != delta.shape:
        return FromAdapter(weight.name, delta.shape, weight.dtype, delta.entry)
    return None


def _saved_first(weight: Weight, placed: list[Placed], bound: Bound) -> list[Placed]:
    """Where a weight is saved and trained besides, the saved one takes the base's place before the rest."""
    saved = [p.delta for p in placed if isinstance(p.delta, Saved) and p.delta.shape == weight.shape]
    if len(saved) != 1 or len(placed) == 1 or placed[0].factor != 1:
        return placed
    bound.whole[weight.name] = FromAdapter(weight.name, weight.shape, weight.dtype, saved[0].entry)
    return [p for p in placed if not isinstance(p.delta, Saved)]


def _pieces(
    model_type: str | None,
    weights: Mapping[str, Weight],
    delta: Delta,
    sites: Sequence[Site],
    part: Part,
) -> Iterator[tuple[str, Placed]]:
    """The places of one delta, which together take all of its rows."""
    for site in sites:
        if weights[site.weight].dtype not in DENSE_FLOATS:
            stored = weights[site.weight].dtype
            raise _misfit(delta, f"means {site.weight}, which is stored as {stored}; it cannot be decoded")
    if isinstance(delta, Experts):
        known = settled(delta, model_type, part.config.get("peft_version"))
        if isinstance(known, str):
            raise _misfit(delta, known)
        delta = known
    first = weights[sites[0].weight]
    if len(sites) > 1 or (sites[0].matrix is not None and delta.stacked and len(first.shape) < 3):
        yield from _over_experts(weights, delta, sites)
    elif sites[0].matrix is not None and len(first.shape) == 3:
        yield first.name, _into_experts(model_type, first, delta, sites[0])
    elif sites[0].matrix is not None and len(delta.shape) == 1:
        yield first.name, _into_expert_biases(first, delta, sites[0])
    else:
        fitted = _fitted(delta, first, model_type)
        fold = max(first.num_rows // max(fitted.num_rows, 1), 1)
        yield first.name, Placed(fitted, 1.0, (0, fitted.num_rows), fold=fold)


def _fitted(delta: Delta, weight: Weight, model_type: str | None) -> Delta:
    """The delta as the weight lies: most are (out, in), those of Conv1D (in, out)."""
    conv1d = is_conv1d(model_type, weight.name, weight.shape)
    straight = delta.misfit(weight.shape)
    if len(weight.shape) == 2 and not isinstance(delta, Experts | Saved):
        turned = delta.turned()
        either_way = straight is None and turned.misfit(weight.shape) is None
        if either_way and model_type is None and is_conv1d_layer(weight.name):
            raise _misfit(delta, f"could lie in {weight.name} either way; config.json has no model_type")
        told = UNKNOWN not in delta.shape  # a size that the adapter does not tell fits anything
        if turned.misfit(weight.shape) is None and (conv1d or (straight is not None and told)):
            return turned.on(weight.shape)
    if straight is not None:
        raise _misfit(delta, f"{straight}, but {weight.name} is {list(weight.shape)}")
    return delta.on(weight.shape)


def _over_experts(
    weights: Mapping[str, Weight], delta: Delta, sites: Sequence[Site]
) -> Iterator[tuple[str, Placed]]:
    """A delta on stacked experts, whose rows lie in a weight for each expert (and for gate and up)."""
    if len(weights[sites[0].weight].shape) != 2:
        raise _misfit(delta, "changes the biases of stacked experts, which the base holds one by one")
    rows, columns = weights[sites[0].weight].shape
    height = rows * sites[0].parts
    shape = (1 + max(site.matrix or 0 for site in sites), height, columns)
    if reason := delta.misfit(shape):
        raise _misfit(delta, f"{reason}, but the base has {shape[0]} experts {[height, columns]}")
    if not delta.stacked:
        raise _misfit(delta, "changes stacked experts, which the base holds one by one")
    fitted = delta.on(shape)
    taken = 0
    for site in sites:
        start = (site.matrix or 0) * height + site.part * rows
        taken += rows
        yield site.weight, Placed(fitted, 1.0, (start, start + rows))
    if taken != fitted.num_rows:
        raise _misfit(delta, f"has {fitted.num_rows} rows, but the base's experts take {taken}")


def _into_experts(model_type: str | None, weight: Weight, delta: Delta, site: Site) -> Placed:
    """A delta on one expert, which lies in a weight with all of them."""
    experts, height, width = weight.shape
    e, part, parts = site.matrix or 0, site.part, site.parts
    straight, turned = (height // parts, width), (width // parts, height)
    fits = delta.misfit(straight) is None and height % parts == 0
    fits_turned = delta.misfit(turned) is None and width % parts == 0
    lies_turned = model_type in _TURNED_EXPERTS
    if e >= experts or not (fits or fits_turned):
        raise _misfit(delta, f"{delta.misfit(straight)}, but {weight.name} is {list(weight.shape)}")
    if fits and not (fits_turned and lies_turned):
        start = e * height + part * straight[0]
        return Placed(delta.on(straight), 1.0, (0, straight[0]), row=start)
    if parts > 1 and model_type == "gpt_oss":
        raise _misfit(delta, f"is one of {parts} that {weight.name} holds interleaved")
    return Placed(delta.on(turned).turned(), 1.0, (0, height), row=e * height, column=part * turned[0])


def _into_expert_biases(weight: Weight, delta: Delta, site: Site) -> Placed:
    """A delta on one expert's bias, which lies in a weight (experts, out) with all of them."""
    shape = (weight.shape[-1] // site.parts,)
    if reason := delta.misfit(shape):
        raise _misfit(delta, f"{reason}, but {weight.name} is {list(weight.shape)}")
    return Placed(delta.on(shape), 1.0, (0, 1), row=site.matrix or 0, column=site.part * shape[0])


def _misfit(delta: Delta, reason: str) -> Refused:
    return Refused(f"adapter: '{delta.module}' {reason}")


def _conflict(weight: Weight, placed: Sequence[Placed], first: int) -> str | None:
    """Why those from number `first` on cannot meet the others in one weight."""
    for number, one in enumerate(placed[first:], first):
        for other in placed[:number]:
            if not _overlap(one, other):
                continue
            if one.delta.module != other.delta.module and one.part == other.part:
                return (
                    f"both '{other.delta.module}' and '{one.delta.module}' mean {weight.name}; check names="
                )
            if one.delta.replaces or other.delta.replaces:
                return (
                    f"{weight.name} would get {other.describe()} and {one.describe()}, whose order would "
                    "change the result"
                )
    return None


def _overlap(one: Placed, other: Placed) -> bool:
    rows = one.row < other.stop and other.row < one.stop
    return rows and one.column < other.column + other.width and other.column < one.column + one.width
