"""What an output holds every weight as: numbers, a format that the recipe names, or the base's own codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.ground import dtypes
from pipeline.ground.codes.code import Code, Found
from pipeline.ground.codes.encoders.fp8 import Fp8Encoder
from pipeline.ground.codes.encoders.linear import is_linear, left_out
from pipeline.ground.codes.encoders.same import same_format
from pipeline.ground.codes.encoders.schemes import SCHEMES, Scheme
from pipeline.ground.errors import Refused
from pipeline.ground.model_config import QUANTIZATION_KEYS
from pipeline.ground.names import is_conv1d, nearest
from pipeline.ground.report import Action, Finding
from pipeline.ground.shards import Entry
from pipeline.merging.pieces import Merged
from pipeline.output.place import Form, Held
from pipeline.weight import Checkpoint, Decoded, Dense, Weight

KEEP = "keep"
CHOICES = (*SCHEMES, KEEP)
Dtype = Callable[[Weight], str]  # what a weight would be stored as if it were not quantized


@dataclass(frozen=True)
class Forms:
    """The weights of an output, what each is held as, and what the config says of that."""

    checkpoint: Checkpoint[Weight]
    of: Mapping[str, Form]
    config_edits: Mapping[str, Any] = field(default_factory=dict)


def check(quantize: str | None) -> None:
    """Refused for a format that there is not."""
    if quantize is not None and quantize not in CHOICES:
        raise Refused(
            f"save.quantize: no format {quantize!r}{nearest(quantize, CHOICES)}; choose one of "
            f"{', '.join(CHOICES)}"
        )


def by_chance(quantize: str | None) -> bool:
    """Whether a format, or plain numbers, can be rounded stochastically."""
    return quantize is None or quantize == KEEP or SCHEMES[quantize].by_chance


def held_as(checkpoint: Checkpoint[Weight], quantize: str | None, dtype: Dtype) -> Forms:
    """What the weights are held as; Refused where a format does not fit the model."""
    if quantize is None:
        edits = checkpoint.config_edits
        return Forms(checkpoint, {w.name: dtype(w) for w in checkpoint.weights}, edits)
    if quantize == KEEP:
        return _kept(checkpoint, dtype)
    return _anew(checkpoint, SCHEMES[quantize], dtype)


def _anew(checkpoint: Checkpoint[Weight], scheme: Scheme, dtype: Dtype) -> Forms:
    """Linear layers in the format, whatever the base held them as."""
    kind = checkpoint.config.model_type
    if turned := [w.name for w in checkpoint.weights if is_conv1d(kind, w.name, w.shape)]:
        raise Refused(
            f"save.quantize: {kind} holds {turned[0]} transposed, as (in, out), which is not quantized here"
        )
    found: dict[str, Form] = {w.name: dtype(w) for w in checkpoint.weights}
    linear = [w for w in checkpoint.weights if is_linear(w.name, w.shape, experts=scheme.experts)]
    unfit = []
    for weight in linear:
        if encoder := scheme.encoder(weight.name, weight.shape, dtype(weight)):
            found[weight.name] = encoder
        else:
            unfit.append(weight)
    quantized = {name for name, form in found.items() if not isinstance(form, str)}
    if not quantized:
        raise Refused(f"save.quantize: no weight of this model can be stored as {scheme.name}")
    skipped = left_out(((w.name, w.shape) for w in checkpoint.weights), quantized)
    config = scheme.config(dtype(linear[0]), skipped, sorted(quantized))
    told = [Finding(text) for text in _told(checkpoint, scheme, found, unfit)]
    edits = {**checkpoint.config_edits, QUANTIZATION_KEYS[0]: config}
    return Forms(replace(checkpoint, findings=(*checkpoint.findings, *told)), found, edits)


def _told(
    checkpoint: Checkpoint[Weight], scheme: Scheme, found: Mapping[str, Form], unfit: list[Weight]
) -> list[str]:
    """What people should know of such an output before they have it."""
    told = []
    if unfit:
        first = f"{unfit[0].name} {list(unfit[0].shape)}"
        told.append(f"{first} does not fit {scheme.name} and stays as it is ({len(unfit)} weights)")
    ragged = [
        form.name
        for form in found.values()
        if isinstance(form, Fp8Encoder)
        and form.grid.height > 1
        and any(n > 128 and n % 128 for n in form.shape)
    ]
    if ragged:
        told.append(
            f"128 does not divide the sides of {ragged[0]} ({len(ragged)} weights): its last blocks are "
            "smaller, which transformers 5.23 decodes wrongly or not at all where it has no FP8 hardware"
        )
    stacked = [w.name for w in checkpoint.weights if len(w.shape) == 3 and "expert" in w.name]
    if stacked or (not scheme.experts and any(".experts." in w.name for w in checkpoint.weights)):
        told.append(f"the experts stay as they are: loaders do not take them as {scheme.name}")
    return told


def _kept(checkpoint: Checkpoint[Weight], dtype: Dtype) -> Forms:
    """The base's own codes: copied, or made anew in the same format where a delta moves what they mean."""
    found: dict[str, Form] = {}
    wrong: dict[str, str] = {}
    for weight in checkpoint.weights:
        code, merged = _code(weight), isinstance(weight, Merged)
        if code is None:
            found[weight.name] = dtype(weight)
        elif not all(dtypes.known(entry.dtype) for entry in code.entries):
            wrong.setdefault(f"a GGUF file ({code.describe})", weight.name)
        elif not merged:
            found[weight.name] = Held(code.describe, code.entries)
        elif encoder := same_format(weight.name, code):
            found[weight.name] = encoder
        else:
            wrong.setdefault(code.describe, weight.name)
    if wrong:
        instead = f"leave it out for {dtypes.config_name(checkpoint.dtype)}, or choose {', '.join(SCHEMES)}"
        raise Refused(
            *(
                f"save.quantize: keep: '{name}' is held as {kind}, which is not written again here; {instead}"
                for kind, name in wrong.items()
            )
        )
    if all(isinstance(form, str) for form in found.values()):
        raise Refused(
            f"save.quantize: keep: the base is not quantized; choose {', '.join(SCHEMES)} to quantize it"
        )
    edits = {k: v for k, v in checkpoint.config_edits.items() if k != QUANTIZATION_KEYS[0]}
    checkpoint, beside = _with_the_rest(checkpoint)
    return Forms(checkpoint, {**found, **beside}, edits)


def found_as(
    checkpoint: Checkpoint[Weight],
    entries: Mapping[str, Entry],
    codes: Sequence[Found],
    config: Mapping[str, Any],
    actions: Mapping[str, Any],
) -> Forms:
    """What a written checkpoint holds the weights as; Refused for codes that none here makes.

    A weight that is not merged and has codes of the base's kind holds the base's very own, or its values
    encoded anew: the `actions` of a manifest tell, else it may be either.
    """
    found: dict[str, Form] = {w.name: _dtype_in(entries, w) for w in checkpoint.weights}
    weights = {weight.name: weight for weight in checkpoint.weights}
    for one in codes:
        weight = weights.get(one.name)
        encoder = same_format(one.name, one.code)
        if weight is None:
            continue
        if encoder is None:
            raise Refused(f"output: '{one.name}' is held as {one.code.describe}, which cannot be judged here")
        own = _code(weight)
        alike = not isinstance(weight, Merged) and own is not None and own.describe == one.code.describe
        action = actions.get(one.name)
        made = None if alike and action == Action.copied.name else encoder
        copied = alike and action != Action.encoded.name
        found[one.name] = Held(one.code.describe, one.code.entries, made, copied)
    if not codes:
        return Forms(checkpoint, found, checkpoint.config_edits)
    checkpoint, beside = _with_the_rest(checkpoint, entries)
    return Forms(checkpoint, {**found, **beside}, {**checkpoint.config_edits, QUANTIZATION_KEYS[0]: config})


def _dtype_in(entries: Mapping[str, Entry], weight: Weight) -> str:
    return entries[weight.name].dtype if weight.name in entries else weight.dtype


def sources_of(weight: Weight) -> dict[str, Entry]:
    """The base's tensors that hold a weight which nothing has changed, by the names of what is written."""
    if isinstance(weight, Decoded):
        return {entry.name: entry for entry in weight.code.entries}
    return {weight.name: weight.source} if weight.source else {}


def _code(weight: Weight) -> Code | None:
    """The codes that the base holds a weight as."""
    while isinstance(weight, Merged):
        weight = weight.base
    return weight.code if isinstance(weight, Decoded) else None


def _with_the_rest(
    checkpoint: Checkpoint[Weight], among: Mapping[str, Entry] | None = None
) -> tuple[Checkpoint[Weight], dict[str, Form]]:
    """The checkpoint with the base's tensors that hold no weight but go with codes: scales of activations.

    Of those, the ones `among` these.
    """
    used = {weight.name for weight in checkpoint.weights}
    used |= {e.name for w in checkpoint.weights if (code := _code(w)) for e in code.entries}
    more: list[Weight] = []
    shards = []
    for shard in checkpoint.shards:
        entries = shard.original.entries if shard.original else ()
        rest = [e for e in entries if e.name not in used and (among is None or e.name in among)]
        more += [Dense(e.name, e.shape, e.dtype, e) for e in rest]
        shards.append(replace(shard, weights=(*shard.weights, *(e.name for e in rest))))
    grown = replace(checkpoint, weights=(*checkpoint.weights, *more), shards=tuple(shards))
    return grown, {weight.name: weight.dtype for weight in more}
