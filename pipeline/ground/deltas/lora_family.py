"""peft_type LORA: which of its variants the tensors of a module are, and with which scale.

Keys and rules of PEFT 0.21: `lora_A.weight`, `lora_embedding_A`, `lora_magnitude_vector`, `lora_B.bias`,
`token_adapter.trainable_tokens_delta`; nested wrappers of bare parameters and of MultiheadAttention show
as `base_layer` in the module's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from pipeline.ground.deltas.delta import UNKNOWN, Delta
from pipeline.ground.deltas.dora import Dora
from pipeline.ground.deltas.experts import Experts
from pipeline.ground.deltas.fields import is_number
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes, is_count
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.deltas.patterns import pattern_value, wrong_patterns
from pipeline.ground.deltas.tokens import TokenRows
from pipeline.ground.deltas.vector import Vector
from pipeline.ground.shards import Entry

NESTED = ".base_layer"
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora")
DECLARED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # by every experts module
_MAGNITUDE = "lora_magnitude_vector"
_TOKENS = "token_adapter.trainable_tokens_delta"


def read(trained: Trained) -> list[Delta]:
    """The deltas of one module's tensors."""
    if _TOKENS in trained.tensors:
        return [_token_rows(trained)]
    if "lora_embedding_A" in trained.tensors or "lora_embedding_B" in trained.tensors:
        return [_embedding(trained)]
    A, B = trained["lora_A.weight"], trained["lora_B.weight"]
    check_floats(trained, *trained.tensors.values())
    if (parameter := _bare_parameter(trained, A)) is not None:
        return [_experts(trained, parameter, A, B)]
    return _layer(trained, A, B)


def _layer(trained: Trained, A: Entry, B: Entry) -> list[Delta]:
    blocks = _blocks(trained)
    if len(A.shape) != len(B.shape) or len(A.shape) < 2 or any(size != 1 for size in B.shape[2:]):
        raise trained.refuse(f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}, which is no LoRA layer")
    if len(A.shape) > 2 and A.shape[0] != B.shape[1] and A.shape[0] % B.shape[1] == 0:
        raise trained.refuse(
            f"is LoRA on a convolution of {A.shape[0] // B.shape[1]} groups; none merges that"
        )
    if A.shape[0] != B.shape[1] * blocks[1]:
        raise trained.refuse(f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}, whose ranks differ")
    rank = _checked_rank(trained, trained.module, A.shape[0])
    module, times = _unnested(trained)
    scale = scaling(trained.module.split(NESTED)[0], trained.config, rank)  # out_proj has its attention's
    shape = (B.shape[0], A.shape[1] * blocks[0], *A.shape[2:])
    lora = Lora(module, "weight", shape, A, B, scale * times, blocks=blocks)
    found: list[Delta] = [_with_magnitude(trained, lora, shape[0])]
    bias = trained.get("lora_B.bias")
    if (bias is None) == bool(trained.config.get("lora_bias")):
        has = "no lora_B.bias" if bias is None else "a lora_B.bias"
        raise trained.refuse(f"has {has}, but the config's lora_bias is {trained.config.get('lora_bias')}")
    if bias is not None:
        if bias.shape != (shape[0],):
            raise trained.refuse(f"has lora_B.bias {list(bias.shape)}, not {[shape[0]]}")
        found.append(Vector(module, "bias", bias.shape, bias, scale))
    return found


def _embedding(trained: Trained) -> Delta:
    A, B = trained["lora_embedding_A"], trained["lora_embedding_B"]
    check_floats(trained, *trained.tensors.values())
    sizes = check_shapes(trained, {"lora_embedding_A": ("r", "num"), "lora_embedding_B": ("dim", "r")})
    scale = scaling(trained.module, trained.config, _checked_rank(trained, trained.module, sizes["r"]))
    shape = (sizes["num"], sizes["dim"])
    lora = Lora(trained.module, "weight", shape, A, B, scale, transposed=True)
    return _with_magnitude(trained, lora, sizes["dim"])


def _with_magnitude(trained: Trained, lora: Lora, outputs: int) -> Delta:
    magnitude = trained.get(_MAGNITUDE)
    if (magnitude is None) == bool(trained.config.get("use_dora")):
        has = "no magnitude" if magnitude is None else "a magnitude"
        raise trained.refuse(f"has {has}, but the config's use_dora is {trained.config.get('use_dora')}")
    if magnitude is None:
        return lora
    if sum(size != 1 for size in magnitude.shape) > 1 or outputs not in (*magnitude.shape, 1):
        raise trained.refuse(f"has {_MAGNITUDE} {list(magnitude.shape)} for {outputs} outputs")
    return Dora(lora.module, lora.parameter, lora.shape, lora, magnitude)


def _token_rows(trained: Trained) -> Delta:
    rows = trained[_TOKENS]
    check_floats(trained, rows)
    indices = trained.config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        fits = [v for k, v in indices.items() if trained.module == k or trained.module.endswith(f".{k}")]
        shared = [] if fits else list(indices.values())  # a tied lm_head has the embeddings' own
        indices = next(iter(fits or shared)) if len(fits or shared) == 1 else None
    if not isinstance(indices, list) or len(rows.shape) != 2 or rows.shape[0] != len(indices):
        raise trained.refuse("has trained token rows that trainable_token_indices does not list")
    return TokenRows(trained.module, "weight", (UNKNOWN, rows.shape[1]), rows, tuple(indices))


def _bare_parameter(trained: Trained, A: Entry) -> str | None:
    """The parameter that target_parameters means, where this is LoRA on a bare parameter.

    A file names the module only: of its parameters the one declared first lies innermost.
    """
    owner = trained.module
    depth = 0
    while owner.endswith(NESTED):
        owner, depth = owner.removesuffix(NESTED), depth + 1
    parameters: list[str] = []
    for target in sorted(set(trained.config.get("target_parameters") or [])):
        path, _, parameter = target.rpartition(".")
        if path:
            if owner == path or owner.endswith(f".{path}"):
                parameters.append(parameter)
        elif depth or A.shape[0] != _rank(owner, trained.config):
            parameters.append(parameter)
    parameters = list(dict.fromkeys(parameters))  # PEFT lists some by two names
    if not parameters:
        return None
    if len(parameters) > 1 and not set(parameters) <= set(DECLARED):
        raise trained.refuse(
            f"has several bare parameters, {', '.join(parameters)}, whose order no file tells"
        )
    for level in range(len(parameters)):
        if owner + NESTED * level not in trained.modules:
            raise trained.refuse(f"lacks the LoRA of one of {', '.join(parameters)}")
    if depth >= len(parameters):
        raise trained.refuse("is nested deeper than target_parameters explains")
    return sorted(parameters, key=_declared, reverse=True)[depth]


def _declared(parameter: str) -> int:
    return DECLARED.index(parameter) if parameter in DECLARED else 0


def _experts(trained: Trained, parameter: str, A: Entry, B: Entry) -> Delta:
    owner = trained.module.removesuffix(NESTED)
    while owner.endswith(NESTED):
        owner = owner.removesuffix(NESTED)
    rank = _rank(f"{owner}.{parameter}", trained.config)
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        raise trained.refuse(
            f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}, no LoRA of rank {rank} on experts"
        )
    shape = (A.shape[0] // rank, B.shape[0], A.shape[1])
    scale = scaling(f"{owner}.{parameter}", trained.config, rank)
    packing = trained.told.expert_major
    return Experts(owner, parameter, shape, A, B, scale, rank, expert_major=packing)


def _unnested(trained: Trained) -> tuple[str, int]:
    """(module, times) of a layer inside MultiheadAttention; PEFT 0.21.2 applies its out_proj twice."""
    if NESTED not in trained.module:
        return trained.module, 1
    if not trained.module.endswith(f"{NESTED}.out_proj"):
        raise trained.refuse("lies inside a wrapper that the config does not explain")
    if trained.told.out_proj_times is None:
        raise trained.refuse(
            "is the out_proj of a MultiheadAttention, whose delta some versions of PEFT apply twice "
            "(0.21.2 does); say extract.out_proj_times=1 or 2"
        )
    return trained.module.replace(NESTED, ""), trained.told.out_proj_times


def _blocks(trained: Trained) -> tuple[int, int]:
    """How many diagonal blocks A and B are, for BD-LoRA."""
    settings = trained.config.get("use_bdlora")
    if not settings:
        return (1, 1)
    name, blocks = trained.module.rpartition(".")[2], settings["nblocks"]
    in_A, in_B = (
        any(pattern in name for pattern in settings.get(f"target_modules_bd_{x}") or []) for x in "ab"
    )
    if in_A and in_B:
        raise trained.refuse("is block-diagonal in A and in B by use_bdlora, which PEFT does not allow")
    return (blocks if in_A else 1, blocks if in_B else 1)


def _checked_rank(trained: Trained, module: str, found: int) -> int:
    told = _rank(module.replace(NESTED, ""), trained.config)
    if "out_proj" in module and NESTED in module:  # a MultiheadAttention's patterns are meant for both
        told = _rank(module.split(NESTED)[0], trained.config)
    if found != told:
        raise trained.refuse(f"has rank {found}, but the config says {told}")
    return found


def _rank(module: str, config: Mapping[str, Any]) -> int:
    return int(pattern_value(module, config.get("rank_pattern"), config["r"]))


def scaling(module: str, config: Mapping[str, Any], rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the alpha that reaches this module."""
    alpha = pattern_value(module, config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What of the config cannot be, or changed the base."""
    found = []
    if not is_count(config.get("r")):
        found.append(f"r is {config.get('r')!r}, not a rank")
    if not is_number(config.get("lora_alpha")):
        found.append(f"lora_alpha is {config.get('lora_alpha')!r}, not a finite number")
    for name, fits, what in (("rank_pattern", is_count, "ranks"), ("alpha_pattern", is_number, "numbers")):
        table = config.get(name) or {}
        if not isinstance(table, dict) or not all(fits(value) for value in table.values()):
            found.append(f"{name} is {table!r}, not a table of patterns and {what}")
        else:
            found += wrong_patterns(name, table)
    for name in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"):
        if not isinstance(config.get(name), bool | None):
            found.append(f"{name} is {config[name]!r}, neither true nor false")
    if (settings := config.get("use_bdlora")) and not (
        isinstance(settings, dict) and is_count(settings.get("nblocks"))
    ):
        found.append(f"use_bdlora is {settings!r}, not a table with nblocks")
    if not _is_list_of(str, config.get("target_parameters") or []):
        found.append(f"target_parameters is {config['target_parameters']!r}, not a list of names")
    return found


def changed_base(config: Mapping[str, Any]) -> str | None:
    """The init that changed the base it was trained on, if one did."""
    init = config.get("init_lora_weights", True)
    return None if init in _PLAIN_INITS else str(init)


def is_convertible(init: str) -> bool:
    """Whether the adapter as it was before training tells what the init took from the base."""
    return init.split("_niter_")[0] in _CONVERTIBLE_INITS


def _is_list_of(kind: type, value: Any) -> bool:
    return (
        isinstance(value, Iterable) and not isinstance(value, str) and all(isinstance(v, kind) for v in value)
    )


KIND = Kind(
    peft_type="LORA",
    tensors=(
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        _MAGNITUDE,
        _TOKENS,
    ),
    fields=frozenset(
        [
            "ensure_weight_tying",
            "eva_config",
            "init_lora_weights",
            "lora_alpha",
            "lora_bias",
            "lora_dropout",
            "megatron_core",
            "monteclora_config",
            "qalora_group_size",
            "r",
            "runtime_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_rslora",
            "velora_config",
        ]
    ),
    read=read,
    unused=("lora_velora_embed", "lora_monteclora_sampler."),
    refused={
        "layer_replication": "replicated layers, onto which PEFT itself merges deltas that pile up",
        "use_qalora": "QALoRA, whose delta lives on groups of inputs",
        "alora_invocation_tokens": "aLoRA, which is active on some tokens only",
        "arrow_config": "Arrow, which routes tokens between adapters",
        "kasa_config": "KaSA, which truncates the base whenever it loads",
        "corda_config": "CorDA, which changed the base it was trained on",
        "loftq_config": "LoftQ, which changed the base it was trained on",
        "lora_ga_config": "LoRA-GA, which changed the base it was trained on",
        "megatron_config": "Megatron's parallel layers",
    },
    wrong=wrong,
)
