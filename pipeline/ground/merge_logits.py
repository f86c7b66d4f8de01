"""How near a merged model is to base + unmerged adapter: KL(adapter||merged) / KL(adapter||base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground import reuse
from pipeline.ground.divergence import divergence
from pipeline.ground.generating import answers_to
from pipeline.ground.identity import of_outputs
from pipeline.ground.logits import (
    Adapters,
    Asked,
    CannotCompare,
    MergedDoesNotRun,
    Predicted,
    adapted,
    reason,
)
from pipeline.ground.predicting import DoesNotFit, Load, View, one_by_one

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 4  # sequences in one pass, where the noise of the evaluation is measured


@dataclass(frozen=True)
class Merge:
    """Folders of adapter and merged model, and how to get base and merged model in float32."""

    told: Path  # the folder of the merged model
    adapters: Adapters
    base: Load
    merged: Load
    reference: Callable[[], str | None] = lambda: None  # what base and adapters are, as a digest

    def predicted(self, asked: Asked) -> Predicted:
        """With the adapter, without, and merged, and the noise of the evaluation."""
        import torch

        try:
            form, told = asked.form, (asked.prompts, self.told)
            key = partial(of_outputs, self.reference, asked.tokens, asked.cls, form.device, *told)
            made = reuse.result(key, partial(self._reference, asked))
        except DoesNotFit:
            raise
        except Exception as error:  # whatever transformers or PEFT raise about base and adapter
            raise CannotCompare(reason(error)) from error
        (with_adapter, without), (by_adapter, by_base, floor) = made
        try:
            with_merged, by_merged = self._judged(asked)
        except DoesNotFit:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:  # says nothing about the merge
            raise CannotCompare(reason(error)) from error
        except Exception as error:
            raise MergedDoesNotRun(reason(error)) from error
        said = [
            {"prompt": prompt, "base": one, "adapter": other, "merged": last}
            for prompt, one, other, last in zip(asked.prompts, by_base, by_adapter, by_merged, strict=False)
        ]
        return Predicted(with_adapter, without, with_merged, {"kl_floor": floor}, said or None)

    def _reference(self, asked: Asked) -> reuse.Result:
        """Outputs and answers with the adapter and without, and the noise: no merged model has part in it."""
        tokens, what = asked.tokens, "base and adapter"
        model = asked.form.ready(lambda: adapted(self.base, self.adapters, asked.cls), tokens, what)
        tuner, each = model.base_model, one_by_one(tokens)
        on, off = _once(tuner.enable_adapter_layers, tuner.disable_adapter_layers)
        views = [View(each, on), View([side_by_side(tokens)], on), View(each, off)]
        with_adapter, noisy, without = asked.form.predictions(model, views, what)
        on()
        by_adapter = answers_to(model, asked.tokenizer, asked.prompts)
        off()
        by_base = answers_to(model, asked.tokenizer, asked.prompts)
        return reuse.Result((with_adapter, without), (by_adapter, by_base, apart(with_adapter, noisy)))

    def _judged(self, asked: Asked) -> tuple[Tensor, list[str]]:
        what = "merged model"
        model = asked.form.ready(lambda: self.merged(asked.cls), asked.tokens, what)
        [found] = asked.form.predictions(model, [View(one_by_one(asked.tokens))], what)
        return found, answers_to(model, asked.tokenizer, asked.prompts)


def _once(on: Callable[[], Any], off: Callable[[], Any]) -> list[Callable[[], None]]:
    """Both switches; each does nothing where it was the last."""
    last = [on]  # as PEFT gives a model

    def switch(this: Callable[[], Any]) -> None:
        if last != [this]:
            this()
            last[0] = this

    return [partial(switch, on), partial(switch, off)]


def side_by_side(tokens: Tensor) -> Tensor:
    """Sequences for a pass of another shape."""
    return tokens[:_TOGETHER] if len(tokens) > 1 else tokens.repeat(2, 1)


def apart(alone: Tensor, values: Tensor) -> float:
    """Mean divergence, in nats, of what such a pass predicts."""
    values = values[: len(alone)]
    return float(divergence(alone[: len(values)], values).mean())


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"KL(adapter||merged) {figures['kl_mean']:.2g}, "
        f"of KL(adapter||base) {figures['kl_adapter_base']:.2g}: ratio {figures['ratio']:.2g}, "
        f"top-1 agreement {figures['top1_agreement']:.2%}"
    )
