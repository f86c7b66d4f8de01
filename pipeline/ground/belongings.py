"""What is wrong around the weights of a merge that somebody else made: names, config, tokenizer.

Pure functions on tables and names; sentences come back, those of `faults` mean that a loader gets
something else than was merged, those of `notes` that something is gone or other than the base's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

_CODES = (".absmax", ".quant_state", ".qweight", ".qzeros", ".SCB", "_blocks", ".weight_packed")
_SHAPING = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "hidden_act", "sliding_window", "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


class Told(NamedTuple):
    """Sentences about what is wrong, and about what should be known."""

    faults: list[str]
    notes: list[str]


def names(planned: Shapes, found: Shapes, config: Mapping[str, Any]) -> list[str]:
    """The likely causes of weights that are missing, too many, or of another shape."""
    missing, extra = planned.keys() - found.keys(), found.keys() - planned.keys()
    if beside := sorted(n for n in extra if "lora_" in n or ".base_layer." in n):
        return [
            f"the adapter's tensors stand beside the base's ({len(beside)}, as {beside[0]}): the PEFT model "
            "was saved unmerged; call merge_and_unload first"
        ]
    if codes := sorted(n for n in extra if n.endswith(_CODES) or any(f"{c}." in n for c in _CODES)):
        return [f"its weights are quantized codes ({codes[0]}): the merge was quantized again"]
    told = []
    if "lm_head.weight" in missing and _flat(config).get("tie_word_embeddings") is not False:
        told.append(
            "lm_head.weight is gone and the config ties it to the embeddings: "
            "what lm_head holds of its own is lost"
        )
        missing = missing - {"lm_head.weight"}
    if renamed := _renamed(missing, extra, planned, found):
        told.append(renamed)
    elif missing and any("experts" in n for n in missing) and any("experts" in n for n in extra):
        told.append(f"its experts are laid out otherwise: {min(extra)} instead of {min(missing)}")
    elif missing:
        layers = sorted({p for n in missing for p in n.split(".") if p.isdigit()}, key=int)
        where = f", of layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else ""
        told.append(
            f"{len(missing)} of {len(planned)} weights are missing{where}, as {min(missing)}: "
            "shards are missing, or the index does not name them"
        )
    for name in sorted(planned.keys() & found.keys()):
        one, other = planned[name], found[name]
        if one != other and one[1:] == other[1:] and name.endswith((*_EMBEDDINGS, "lm_head.weight")):
            told.append(
                f"{name} has {other[0]} rows instead of {one[0]}: "
                "the vocabulary was not resized as the adapter's"
            )
        elif one != other:
            how = "transposed" if one == other[::-1] else f"of shape {list(other)} instead of {list(one)}"
            told.append(f"{name} is {how}")
    return told[:8]


def _renamed(missing: set[str], extra: set[str], planned: Shapes, found: Shapes) -> str | None:
    """One change of the leading path that explains what is missing."""
    changes: Counter[tuple[str, str]] = Counter()
    example = ""
    ends: dict[str, list[str]] = {}
    for name in extra:
        parts = name.split(".")
        for n in range(len(parts)):
            ends.setdefault(".".join(parts[n:]), []).append(name)
    for name in sorted(missing):
        parts = name.split(".")
        for n in range(len(parts) - 1):
            end = ".".join(parts[n:])
            alike = [e for e in ends.get(end, []) if found[e] == planned[name]]
            if len(alike) == 1:
                changes[name.removesuffix(end), alike[0].removesuffix(end)] += 1
                example = example or f"{alike[0]} instead of {name}"
                break
    if not changes or sum(changes.values()) < 0.5 * len(missing):
        return None
    count = sum(changes.values())
    return f"{count} weights have other names, as {example}: a loader does not find them"


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model, wherever they stand."""
    text, rope = config.get("text_config"), config.get("rope_parameters")
    inner = text if isinstance(text, dict) else {}
    rope = inner.get("rope_parameters", rope)
    theta = {"rope_theta": rope["rope_theta"]} if isinstance(rope, dict) and "rope_theta" in rope else {}
    return {**config, **theta, **inner}


def configs(wanted: Mapping[str, Any], found: Mapping[str, Any], shapes: Shapes, files: set[str]) -> Told:
    """The output's config.json against what it should say and what its weights are."""
    faults, notes = [], []
    right, own = _flat(wanted), _flat(found)
    if "adapter_config.json" in files:
        faults.append("the adapter's files lie beside the merged weights: loaders attach it a second time")
    for key in ("quantization_config", "compression_config"):
        if key in own and not any(n.endswith(_CODES) for n in shapes) and key not in right:
            faults.append(
                f"config.json still has a {key}, but the weights are plain: loaders quantize or refuse"
            )
    rows = next((s[0] for n, s in shapes.items() if n.endswith(_EMBEDDINGS)), None)
    size = own.get("vocab_size")
    if rows is not None and isinstance(size, int) and size != rows:
        faults.append(f"config.json says vocab_size {size}, but the embeddings have {rows} rows")
    for key in _SHAPING:
        if key in right and key in own and not _same(right[key], own[key]):
            faults.append(f"config.json says {key} {own[key]!r} instead of {right[key]!r}")
    notes += [
        f"config.json says {key} {own[key]!r} instead of {right[key]!r}"
        for key in _TOKENS
        if key in right and key in own and right[key] != own[key]
    ]
    return Told(faults, notes)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)


def retied(config: Mapping[str, Any], same: bool | None) -> list[str]:
    """`same`: whether lm_head and embeddings hold the same values; None where one of them is not there."""
    if same is False and _flat(config).get("tie_word_embeddings") is True:
        return [
            "config.json ties lm_head to the embeddings, but the file holds two different ones: "
            "a loader drops one"
        ]
    return []


def tokenizers(
    wanted: Mapping[str, Any], found: Mapping[str, Any] | None, template: tuple[bool, bool]
) -> Told:
    """tokenizer.json against what it should be; `template`: whether there should be one, and is."""
    notes = ["the chat template is gone"] if template[0] and not template[1] else []
    if not wanted:
        return Told([], notes)
    if found is None:
        return Told([], ["there is no tokenizer.json beside the weights", *notes])
    right, own = _vocabulary(wanted), _vocabulary(found)
    faults = []
    if lost := [t for t in right if t not in own]:
        faults.append(f"the tokenizer lacks {len(lost)} tokens that it should have, as {lost[0]!r}")
    elif moved := [t for t in right if own[t] != right[t]]:
        faults.append(f"the tokenizer gives {len(moved)} tokens other ids, as {moved[0]!r} {own[moved[0]]}")
    elif more := [t for t in own if t not in right]:
        notes.append(f"the tokenizer has {len(more)} tokens more, as {more[0]!r}")
    return Told(faults, notes)


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    table = dict(known) if isinstance(known, dict) else {}
    if isinstance(known, list):  # unigram: [[token, score], ...]
        table = {str(row[0]): n for n, row in enumerate(known) if isinstance(row, list) and row}
    added = tokenizer.get("added_tokens")
    if isinstance(added, list):
        table |= {str(t["content"]): t.get("id") for t in added if isinstance(t, dict) and "content" in t}
    return table
