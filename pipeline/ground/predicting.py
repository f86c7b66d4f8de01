"""What models predict on batches of tokens, and the forms in which they are run: in memory, or by layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.ground.errors import PipelineError
from pipeline.ground.progress import Progress, working

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[type], Any]  # the model class to a model


class DoesNotFit(PipelineError):  # noqa: N818  it reads like what happened
    """Not even one weight at a time fits into memory."""


@dataclass(frozen=True)
class View:
    """Batches, `(sequences, length)` token ids each, and what makes the model as it is to be seen on them."""

    batches: Sequence[Tensor]
    turn: Callable[[], object] = lambda: None


class Form(Protocol):
    """How models are run; the bits are the same in all forms."""

    @property
    def device(self) -> str: ...

    @property
    def speaks(self) -> bool:
        """Whether prompts can be answered."""

    def ready(self, load: Callable[[], Any], tokens: Tensor, what: str) -> Any:
        """The model, to be run on so many tokens; what was there before it is gone."""

    def predictions(self, model: Any, views: Sequence[View], what: str) -> list[Tensor]:
        """What it predicts in each view, `(positions, classes)` as `predictions` gives it."""

    def told(self) -> Mapping[str, Any]:
        """Figures of its own for the report."""


@dataclass(frozen=True)
class InMemory:
    """One model at a time is in memory."""

    device: str
    speaks: bool = True

    def ready(self, load: Callable[[], Any], tokens: Tensor, what: str) -> Any:
        import torch

        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        with working(f"comparing logits: loading {what}"):
            return load().eval().to(self.device)

    def predictions(self, model: Any, views: Sequence[View], what: str) -> list[Tensor]:
        import torch

        found, total = [], sum(ids.numel() for view in views for ids in view.batches)
        with Progress(f"comparing logits: {what}", total, "tokens") as bar:
            for view in views:
                view.turn()
                parts = []
                for ids in view.batches:
                    parts.append(predictions(model, ids))
                    bar.advance(ids.numel())
                found.append(torch.cat(parts))
        return found

    def told(self) -> Mapping[str, Any]:
        return {}


def outputs(load: Load, cls: type, tokens: Tensor, form: Form, what: str) -> Tensor:
    """`(positions, classes)` of a model that is loaded for it, each sequence of `tokens` run alone."""
    model = form.ready(lambda: load(cls), tokens, what)
    return form.predictions(model, [View(one_by_one(tokens))], what)[0]


def one_by_one(tokens: Tensor) -> list[Tensor]:
    """Each sequence as a batch."""
    return list(tokens.split(1))


def predictions(model: Any, ids: Tensor) -> Tensor:
    """`(positions, classes)` log-probabilities; of a model without a head, its hidden states; on the CPU."""
    out = model(input_ids=ids.to(model.device))
    logits = getattr(out, "logits", None)
    values = out.last_hidden_state if logits is None else logits.float().log_softmax(-1)
    flat: Tensor = values.float().cpu().flatten(0, -2)
    return flat
