"""How many parameters an adapter's config says were trained, and how many its file holds.

The count that a trainer prints is the one figure that users remember; when a file lacks what was trained
beside the LoRA it falls by a factor of ten, and everything still loads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pipeline.ground.base_modules import Module, base_modules, plain, suffixes
from pipeline.ground.deltas.patterns import pattern_value
from pipeline.ground.target_rules import saving
from pipeline.ground.targets import promise

LORA = "lora"
SAVED = "embeddings and heads saved whole"
TOKENS = "token rows"
BIASES = "biases"
MAGNITUDES = "dora magnitudes"
ALONG = "base weights saved along"
OTHER = "other tensors"

_PREFIX = "base_model.model."
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embed_in|tok_embeddings|word_embeddings|wte|shared)")
_TIED = ("embed_out", "lm_head", "output")  # heads that files lack where they are the embeddings
_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?P<suffix>lora_[AB]\.weight|lora_embedding_[AB]|lora_B\.bias|lora_magnitude_vector(?:\.weight)?"
    r"|(?:token_adapter\.)?trainable_tokens_delta|[^.]+)"
)
_KINDS = {
    "lora_A.weight": LORA,
    "lora_B.weight": LORA,
    "lora_embedding_A": LORA,
    "lora_embedding_B": LORA,
    "lora_B.bias": BIASES,
    "lora_magnitude_vector": MAGNITUDES,
    "lora_magnitude_vector.weight": MAGNITUDES,
    "token_adapter.trainable_tokens_delta": TOKENS,
    "trainable_tokens_delta": TOKENS,
}


@dataclass(frozen=True, slots=True)
class Audit:
    """Trained parameters by kind; kinds with none are left out.

    What only the file can tell, like the experts of another layout than the base's, counts as promised.
    Copies of the base's weights that PEFT saves along are held and were never trained.
    """

    kinds: Mapping[str, tuple[int, int]]
    """kind -> (promised parameters, held parameters)"""

    @property
    def promised(self) -> int:
        return sum(promised for promised, _ in self.kinds.values())

    @property
    def held(self) -> int:
        return sum(held for _, held in self.kinds.values())

    def sentence(self) -> str | None:
        """What the file lacks, if anything."""
        lacking = [f"{p - h:,} of {p:,} {kind}" for kind, (p, h) in self.kinds.items() if h < p]
        if not lacking:
            return None
        return f"holds {self.held:,} of {self.promised:,} trained parameters; it lacks {', '.join(lacking)}"


def audit(
    config: Mapping[str, Any],
    held: Mapping[str, tuple[int, ...]],
    base: Mapping[str, tuple[int, ...]],
    num_layers: int | None = None,
    renames: Mapping[str, str] = {},
) -> Audit:
    """Counts the parameters of a LoRA: `held` are the adapter's tensors by their keys, with their shapes.

    `base`, `num_layers`, `renames` are as in `targets.unkept`. Promised of a vocabulary that was resized in
    training are the base's rows.
    """
    tensors = {key: _module_and_kind(key.removeprefix(_PREFIX), config) for key in held}
    modules = {module for module, kind in tensors.values() if kind not in (BIASES, ALONG)}
    trained = promise(config, modules, base, num_layers, renames).trained
    touched = {module for module, _ in tensors.values()}
    known = base_modules(touched, ((n, len(s)) for n, s in base.items()), num_layers, renames).modules
    has, must = Counter[str](), Counter[str]()
    for key, (module, kind) in tensors.items():
        has[kind] += prod(held[key])
        told = module in trained if kind in (LORA, MAGNITUDES) else kind != OTHER
        must[kind] += 0 if told else prod(held[key])
    for module, weight in trained.items():
        must.update(_of_lora(config, module, weight, base))
    must[SAVED] += _saved(config, known, base, {k: held[k] for k in held if tensors[k][1] == SAVED})
    must[TOKENS] += _rows(config, known, base, modules)
    if config.get("bias") == "all":
        saved = saving(config)
        must[BIASES] += sum(
            prod(base[m.weight]) for m in known if m.weight.endswith(".bias") and not saved(m.name)
        )
    order = (LORA, MAGNITUDES, SAVED, TOKENS, BIASES, OTHER, ALONG)
    return Audit({kind: (must[kind], has[kind]) for kind in order if must[kind] or has[kind]})


def _module_and_kind(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Of a tensor, by its key without PEFT's prefix."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        return name, OTHER
    module, suffix = plain(match["module"]), match["suffix"]
    if suffix in _KINDS:
        return module, _KINDS[suffix]
    if saving(config)(module):
        return module, SAVED
    if suffix == "bias" and config.get("bias", "none") != "none":
        return module, BIASES
    return module, ALONG if suffix in ("weight", "bias") else OTHER


def _of_lora(
    config: Mapping[str, Any], module: str, weight: str, base: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """What LoRA on one module trains: A is (rank, in, *kernel), B is (out, rank)."""
    if config.get("peft_type", "LORA") != "LORA":
        return {}
    shape = base[weight]
    rank = int(pattern_value(module, config.get("rank_pattern"), config["r"]))
    is_turned = bool(_EMBEDDING.fullmatch(module) or config.get("fan_in_fan_out"))
    outputs = shape[1] if is_turned else shape[0]
    found = {LORA: rank * (shape[0] + prod(shape[1:]))}
    if config.get("use_dora"):
        found[MAGNITUDES] = outputs
    if config.get("lora_bias"):
        found[BIASES] = outputs
    if config.get("bias") == "lora_only":
        found[BIASES] = prod(base.get(f"{weight.rpartition('.')[0]}.bias", (0,)))
    return found


def _saved(
    config: Mapping[str, Any],
    known: Collection[Module],
    base: Mapping[str, tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]],
) -> int:
    """What is saved whole: as the base has it, else as the file has it, else as the embeddings."""
    found: dict[str, int] = {}
    for entry in config.get("modules_to_save") or []:
        saved = saving({"modules_to_save": [entry]})
        of_base = {m.weight: prod(base[m.weight]) for m in known if saved(m.name)}
        of_file = {key: prod(shape) for key, shape in held.items() if saved(_path(key))}
        tied = {entry: prod(_embeddings(known, base))} if entry.rpartition(".")[2] in _TIED else {}
        found |= of_base or of_file or tied
    return sum(found.values())


def _rows(
    config: Mapping[str, Any],
    known: Collection[Module],
    base: Mapping[str, tuple[int, ...]],
    held: Collection[str],
) -> int:
    """Token rows, as long as the embeddings' (number, dim); the same ones of a tied module count once."""
    rows = config.get("trainable_token_indices") or {}
    dim = _embeddings(known, base)[1]
    if isinstance(rows, list):
        return len(rows) * dim
    endings = {s for module in held for s in suffixes(module)}
    written = [indices for entry, indices in rows.items() if entry in endings]
    return sum(len(i) * dim for entry, i in rows.items() if entry in endings or i not in written)


def _embeddings(known: Iterable[Module], base: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    found = (base[m.weight] for m in known if m.is_matrix and not m.stack and _EMBEDDING.fullmatch(m.name))
    return next(found, (0, 0))


def _path(key: str) -> str:
    """The module of a tensor that was saved whole."""
    return plain(key.removeprefix(_PREFIX).rpartition(".")[0])
