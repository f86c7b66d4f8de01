"""Which formula makes of a module's tensors what they change."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.ground.formulas import low_rank, patterned, products, rotations, shared_bases, values
from pipeline.ground.formulas.module import Formula

# By peft_type: the words that begin an adapter's own tensors in a key, with the formula that they call for.
FORMULAS: Mapping[str, Mapping[str, Formula]] = {
    "LORA": {
        "lora_A": low_rank.lora,
        "lora_B": low_rank.lora,
        "lora_magnitude_vector": low_rank.lora,
        "lora_embedding_A": low_rank.embedding,
        "lora_embedding_B": low_rank.embedding,
        "trainable_tokens_delta": values.tokens,
    },
    "ADALORA": dict.fromkeys(("lora_A", "lora_B", "lora_E"), low_rank.adalora),
    "DELORA": dict.fromkeys(("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), low_rank.delora),
    "GRALORA": dict.fromkeys(
        ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), low_rank.gralora
    ),
    "LOHA": dict.fromkeys(
        (*(f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"), "hada_t1", "hada_t2"), products.loha
    ),
    "LOKR": dict.fromkeys(
        (*(f"lokr_w{n}{x}" for n in (1, 2) for x in ("", "_a", "_b")), "lokr_t2"), products.lokr
    ),
    "HIRA": dict.fromkeys(
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), products.hira
    ),
    "OFT": dict.fromkeys(("oft_R", "oft_embedding_R"), rotations.oft),
    "BOFT": dict.fromkeys(("boft_R", "boft_s"), rotations.boft),
    "HRA": {"hra_u": rotations.hra},
    "VERA": dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), shared_bases.vera),
    "RANDLORA": dict.fromkeys(
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), shared_bases.randlora
    ),
    "VBLORA": dict.fromkeys(
        (f"vblora_logits_{x}{tail}" for x in "AB" for tail in ("", "_topk_indices", "_topk_weights")),
        shared_bases.vblora,
    ),
    "FOURIERFT": {"fourierft_spectrum": patterned.fourierft},
    "C3A": {"c3a_kernel": patterned.c3a},
    "SHIRA": dict.fromkeys(("shira_weight", "shira_indices"), patterned.shira),
    "MISS": {"miss_block": patterned.miss},
    "IA3": {"ia3_l": values.ia3},
    "LN_TUNING": {"ln_tuning_layers": values.saved},
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": values.tokens},
}  # fmt: skip
