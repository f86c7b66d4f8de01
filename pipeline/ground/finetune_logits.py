"""How near base + extracted adapter is to the fine-tune: KL(finetune||extracted) / KL(finetune||base)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.ground import logits
from pipeline.ground.divergence import compared
from pipeline.ground.progress import working


def compare(
    told: Path,
    adapter: Path,
    base: Callable[[type], Any],
    tuned: Callable[[type], Any],
    text: str,
    num_tokens: int,
    device: str,
) -> tuple[dict[str, Any], Sequence[str]]:
    """(figures, what had to be assumed); `told` holds the fine-tune's config.json and tokenizer."""
    import torch

    with logits.quiet(), torch.inference_mode():
        config, tokenizer, cls = logits.prepare(told)
        assumed: list[str] = []
        tokens = logits.tokens_of(tokenizer, text, config, num_tokens, assumed)
        try:
            with working("comparing logits: base and extracted adapter"):
                model = logits.adapted(logits.Models(told, [(adapter, 1.0)], base), cls, device)
                extracted = logits.outputs(model, tokens)
            del model
            gc.collect()
            with working("comparing logits: base"):
                plain = base(cls).eval().to(device)  # disabling an adapter does not bring biases back
                without = logits.outputs(plain, tokens)
            del plain
            gc.collect()
            with working("comparing logits: fine-tune"):
                model = tuned(cls).eval().to(device)
                wanted = logits.outputs(model, tokens)
        except logits.CannotCompare:
            raise
        except Exception as error:  # whatever transformers or PEFT raise
            raise logits.CannotCompare(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error
        if without.shape != wanted.shape:
            without, extracted, wanted = _common(without, extracted, wanted)
        figures = compared(wanted, without, extracted)
    return {
        "kl_finetune_extracted": figures["kl_mean"],
        "kl_finetune_base": figures["kl_adapter_base"],
        "ratio": figures["ratio"],
        "ratio_interval": figures["ratio_interval"],
        "top1_agreement": figures["top1_agreement"],
        "finite": figures["finite"],
        "tokens": tokens.numel(),
    }, assumed


def _common(*outputs: Any) -> list[Any]:
    """The classes that all have, anew as log-probabilities: a fine-tune may know more tokens."""
    least = min(values.shape[-1] for values in outputs)
    return [values[:, :least].log_softmax(-1) for values in outputs]


def as_text(figures: dict[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"KL(finetune||extracted) {figures['kl_finetune_extracted']:.2g}, "
        f"of KL(finetune||base) {figures['kl_finetune_base']:.2g}: ratio {figures['ratio']:.2g}, "
        f"top-1 agreement {figures['top1_agreement']:.2%}"
    )
