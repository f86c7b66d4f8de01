"""One spelling for the names that eras of transformers gave to the same weight.

Only names are read, never a model_type: the same model_type occurs on disk in several layouts. Facts from
transformers 5.23, `conversion_mapping.py`, and the modelling code of 4.50 to 4.57 that it replaced.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Around the layers, these say how deep the class nests them, not which ones they are.
_WRAPPERS = frozenset({"model", "language_model"})
# base_model_prefix of encoders and older decoders: the files of a model without its head lack it.
BARE_PREFIXES = frozenset(
    {"albert", "backbone", "beit", "bert", "convbert", "deberta", "deit", "dinov2", "distilbert", "electra"}
    | {"esm", "gpt_neox", "hubert", "layoutlm", "longformer", "mpnet", "roberta", "swin", "transformer"}
    | {"vit", "wav2vec2", "wavlm"}
)

_N = "\0"  # stands for a number between dots; no readable name holds it
NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_NUMBERS = re.compile(rf"(?<![^.]){NUMBER}(?![^.])")

# Applied in this order to the template of a whole name; # is a number.
_SPELLINGS = tuple(
    (re.compile(pattern.replace("#", _N)), spelling.replace("#", _N))
    for pattern, spelling in {
        r"^embed_out\.": "lm_head.",  # GPT-NeoX
        r"(^|\.)LayerNorm\.gamma$": r"\1LayerNorm.weight",  # BERT files made from TensorFlow
        r"(^|\.)LayerNorm\.beta$": r"\1LayerNorm.bias",
        r"(_tower|vision_model)\.vision_model\.": r"\1.",  # CLIP and SigLIP within a VLM
        # ViT, DeiT, BEiT, DINOv2, Swin
        r"(^|\.)encoder\.layer\.#\.": r"\1layers.#.",
        r"\.attention\.(attention|self)\.query\.": ".attention.q_proj.",
        r"\.attention\.(attention|self)\.key\.": ".attention.k_proj.",
        r"\.attention\.(attention|self)\.value\.": ".attention.v_proj.",
        r"\.attention\.output\.dense\.": ".attention.o_proj.",
        r"\.#\.intermediate\.dense\.": ".#.mlp.fc1.",
        r"\.#\.output\.dense\.": ".#.mlp.fc2.",
        # Mixtures of experts
        r"\.block_sparse_moe\.input_linear\.weight$": ".mlp.experts.gate_up_proj",  # GraniteMoE
        r"\.block_sparse_moe\.output_linear\.weight$": ".mlp.experts.down_proj",
        r"\.mlp\.experts\.fc1\.weight$": ".mlp.experts.gate_up_proj",  # Aria
        r"\.mlp\.experts\.fc2\.weight$": ".mlp.experts.down_proj",
        r"\.block_sparse_moe\.": ".mlp.",
        r"\.mlp\.moe_statics\.": ".mlp.gate.moe_statics.",  # ERNIE 4.5
        r"\.mlp\.router\.(layer\.|gate\.)?(?=(weight|bias)$)": ".mlp.gate.",  # PhiMoE, GraniteMoE, HunYuan 3
        r"\.experts\.#\.w1\.": ".experts.#.gate_proj.",
        r"\.experts\.#\.w3\.": ".experts.#.up_proj.",
        r"\.experts\.#\.w2\.": ".experts.#.down_proj.",
        r"\.experts\.(gate_up|down)_projs\.#\.": r".experts.#.\1_proj.",  # gpt-oss in bitsandbytes' days
    }.items()
)


def canonical(name: str) -> str:
    """The name of a weight, module and parameter, as every era's spelling of it has it: `layers.0.mlp...`.

    Two names of one model with the same canonical form mean the same weight or two that nothing here can
    tell apart; who asks has to look whether there are two.
    """
    numbers = iter(_NUMBERS.findall(name))
    return re.sub(_N, lambda _: next(numbers), _spelled(_NUMBERS.sub(_N, name)))


def stack(name: str) -> str:
    """What stands before the first number, `model.layers` of `model.layers.0.mlp.gate.weight`, or ''."""
    return name[: found.start() - 1] if (found := _NUMBERS.search(name)) and found.start() else ""


@lru_cache(maxsize=65536)
def _spelled(template: str) -> str:
    *path, parameter = template.split(".")
    depth = path.index(_N) if _N in path else len(path)
    around = [part for part in path[:depth] if part not in _WRAPPERS]
    spelled = ".".join([*around, *path[depth:], parameter])
    for pattern, spelling in _SPELLINGS:
        spelled = pattern.sub(spelling, spelled)
    return spelled
