"""How near an extraction is to the fine-tune: KL(finetune||extracted) / KL(finetune||base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground import reuse
from pipeline.ground.identity import of_outputs
from pipeline.ground.logits import Asked, CannotCompare, Predicted, reason
from pipeline.ground.predicting import DoesNotFit, Load, outputs

if TYPE_CHECKING:
    from torch import Tensor

_OURS = {  # by the names of figures for which the fine-tune is what an adapter is to a merge
    "kl_finetune_extracted": "kl_mean",
    "kl_finetune_base": "kl_adapter_base",
    "perplexity_base": "perplexity_base",
    "perplexity_finetune": "perplexity_adapter",
    "perplexity_extracted": "perplexity_merged",
}
_SAME = (
    *("ratio", "ratio_interval", "top1_agreement", "finite", "perplexity_ratio", "perplexity_ratio_error"),
    *("tokens", "layer_by_layer", "weights_held", "peak_memory"),
)


@dataclass(frozen=True)
class Model:
    """How to get a model; `which` is a digest of it, by which runs of a sweep share its outputs."""

    load: Load
    which: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Extraction:
    """Fine-tune, base, and what was extracted: base + adapter, or the two merged."""

    told: Path  # a folder with the fine-tune's config.json and tokenizer
    tuned: Model
    base: Model
    extracted: Model

    def predicted(self, asked: Asked) -> Predicted:
        """One after the other: disabling an adapter does not bring biases back, so the base runs alone."""
        try:
            extracted = _outputs(self.extracted, asked, "extracted model")
            base = _outputs(self.base, asked, "base")
            tuned = _outputs(self.tuned, asked, "fine-tune")
        except (CannotCompare, DoesNotFit):
            raise
        except Exception as error:  # whatever transformers or PEFT raise
            raise CannotCompare(reason(error)) from error
        if base.shape != tuned.shape:
            tuned, base, extracted = _common(tuned, base, extracted)
        return Predicted(tuned, base, extracted)


def _outputs(model: Model, asked: Asked, what: str) -> Tensor:
    key = partial(of_outputs, model.which, asked.tokens, asked.cls, asked.form.device)
    run = partial(outputs, model.load, asked.cls, asked.tokens, asked.form, what)
    [found] = reuse.result(key, lambda: reuse.Result([run()])).tensors
    return found


def _common(*outputs: Tensor) -> list[Tensor]:
    """The classes that all have, anew as log-probabilities: a fine-tune may know more tokens."""
    least = min(values.shape[-1] for values in outputs)
    return [values[:, :least].log_softmax(-1) for values in outputs]


def named(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those for the report, by names that say what was compared."""
    ours = {name: figures[theirs] for name, theirs in _OURS.items() if theirs in figures}
    return ours | {name: figures[name] for name in _SAME if name in figures}


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"KL(finetune||extracted) {figures['kl_finetune_extracted']:.2g}, "
        f"of KL(finetune||base) {figures['kl_finetune_base']:.2g}: ratio {figures['ratio']:.2g}, "
        f"top-1 agreement {figures['top1_agreement']:.2%}"
    )
