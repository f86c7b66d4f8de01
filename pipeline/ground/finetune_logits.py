"""How near base + extracted adapter is to the fine-tune: KL(finetune||extracted) / KL(finetune||base)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground import logits, reuse
from pipeline.ground.divergence import compared
from pipeline.ground.identity import of_outputs
from pipeline.ground.libraries import quiet
from pipeline.ground.progress import working

if TYPE_CHECKING:
    from torch import Tensor

Which = Callable[[], str | None]
_OF_THE_TEXT = {  # our names: those of the figures, for which the fine-tune is what an adapter is to a merge
    "perplexity_base": "perplexity_base",
    "perplexity_finetune": "perplexity_adapter",
    "perplexity_extracted": "perplexity_merged",
    "perplexity_ratio": "perplexity_ratio",
    "perplexity_ratio_error": "perplexity_ratio_error",
}


def compare(
    told: Path,
    adapter: Path,
    base: Callable[[type], Any],
    tuned: Callable[[type], Any],
    text: str,
    num_tokens: int,
    device: str,
    which_base: Which = lambda: None,
    which_tuned: Which = lambda: None,
) -> tuple[dict[str, Any], Sequence[str]]:
    """(figures, what had to be assumed); `told` holds the fine-tune's config.json and tokenizer.

    `which_...` give base and fine-tune as digests, by which runs of a sweep share their outputs.
    """
    import torch

    with quiet(), torch.inference_mode():
        config, tokenizer, cls = logits.prepare(told)
        assumed: list[str] = []
        tokens = logits.tokens_of(tokenizer, text, config, num_tokens, assumed)
        try:
            with working("comparing logits: base and extracted adapter"):
                model = logits.adapted(logits.Models(told, [(adapter, 1.0)], base), cls, device)
                extracted = logits.outputs(model, tokens)
            del model
            gc.collect()
            with working("comparing logits: base"):  # disabling an adapter does not bring biases back
                without = _outputs(base, cls, tokens, device, which_base)
            with working("comparing logits: fine-tune"):
                wanted = _outputs(tuned, cls, tokens, device, which_tuned)
        except logits.CannotCompare:
            raise
        except Exception as error:  # whatever transformers or PEFT raise
            raise logits.CannotCompare(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error
        if without.shape != wanted.shape:
            without, extracted, wanted = _common(without, extracted, wanted)
        next_tokens = logits.following(tokens, cls, len(wanted))
        if next_tokens is not None:
            next_tokens = next_tokens.where(next_tokens < wanted.shape[-1], -1)
        figures = compared(wanted, without, extracted, next_tokens)
    return {
        "kl_finetune_extracted": figures["kl_mean"],
        "kl_finetune_base": figures["kl_adapter_base"],
        "ratio": figures["ratio"],
        "ratio_interval": figures["ratio_interval"],
        "top1_agreement": figures["top1_agreement"],
        "finite": figures["finite"],
        **{ours: figures[theirs] for ours, theirs in _OF_THE_TEXT.items() if theirs in figures},
        "tokens": tokens.numel(),
    }, assumed


def _outputs(load: Callable[[type], Any], cls: type, tokens: Tensor, device: str, which: Which) -> Tensor:
    def run() -> reuse.Result:
        return reuse.Result([logits.outputs(load(cls).eval().to(device), tokens)])

    [found] = reuse.result(partial(of_outputs, which, tokens, cls, device), run).tensors
    gc.collect()
    return found


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
