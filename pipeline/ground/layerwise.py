"""Models larger than memory, run with one layer of weights in it at a time.

All passes - each sequence in each view of the model - go through a layer before any goes on to the next, so a
weight is read once for all of them. The operations and their shapes are those of models in memory, hence so
are the bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground import logits
from pipeline.ground.deferred import cell_of
from pipeline.ground.predicting import DoesNotFit, View, predictions
from pipeline.ground.progress import Progress, working
from pipeline.ground.turns import Turns
from pipeline.ground.units import show_bytes
from pipeline.ground.unread import Stream

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 8  # sequences whose passes take turns: their hidden states, logits and threads are held at once


@dataclass(frozen=True)
class Layers:
    """The form of models whose weights are deferred: the stream they come from, the bytes all may take."""

    stream: Stream
    memory: int
    device: str
    speaks: bool = False  # each token would read all weights anew

    def ready(self, load: Callable[[], Any], tokens: Tensor, what: str) -> Any:
        """The model, with room for its weights in the stream; DoesNotFit where there is none."""
        gc.collect()
        self.stream.drop()
        self.stream.room = 0
        with working(f"comparing logits: loading {what}"):
            model = load().eval().to(self.device)
        text = model.config.get_text_config()
        for config in (model.config, text):
            if hasattr(config, "use_cache"):
                config.use_cache = False  # keys and values that nothing would ask for
        held = [*model.parameters(), *model.buffers()]
        cells = [cell for tensor in held if (cell := cell_of(tensor))]
        resident = sum(tensor.numel() * tensor.itemsize for tensor in held if not cell_of(tensor))
        resident += sum(cell.num_bytes for cell in cells if cell.resident is not None)
        beside = resident + logits.memory_needed(0, getattr(text, "vocab_size", 1), tokens.numel())
        beside += max((cell.extra_bytes for cell in cells), default=0)
        least = beside + max((cell.num_bytes for cell in cells), default=0)
        if least > self.memory:
            takes, free = show_bytes(least), show_bytes(self.memory)
            raise DoesNotFit(f"that takes {takes} of memory layer by layer, {free} are free")
        self.stream.drop()
        self.stream.room = self.memory - beside
        return model

    def predictions(self, model: Any, views: Sequence[View], what: str) -> list[Tensor]:
        """What the model predicts in each view; some batches of every view at a time."""
        import torch

        found: list[list[Tensor]] = [[] for _ in views]
        for first in range(0, max(len(view.batches) for view in views), _TOGETHER):
            passes = [
                (number, view.turn, ids)
                for number, view in enumerate(views)
                for ids in view.batches[first : first + _TOGETHER]
            ]
            told = _run(model, [(turn, ids) for _, turn, ids in passes], self.stream, what)
            for number, _, _ in passes:
                found[number].append(told.pop(0))
        return [torch.cat(found.pop(0)) for _ in views]  # each list goes as its values are joined

    def told(self) -> Mapping[str, Any]:
        return {"layer_by_layer": True, "weights_held": self.stream.most}


def _run(
    model: Any, passes: Sequence[tuple[Callable[[], object], Tensor]], stream: Stream, what: str
) -> list[Tensor]:
    """What the model predicts in each pass."""
    import torch

    turns, num_threads = Turns(), torch.get_num_threads()

    def work(ids: Tensor) -> Callable[[], Tensor]:
        def predict() -> Tensor:
            torch.set_num_threads(num_threads)
            with torch.inference_mode():
                return predictions(model, ids)

        return predict

    with _pausing(model, turns) as main, Progress(f"comparing logits: {what}", len(main), "layers") as bar:
        ends = _count(main, lambda: bar.advance(1), len(passes))
        try:
            return turns.run([(before, work(ids)) for before, ids in passes], stream.drop)
        finally:
            for end in ends:
                end.remove()


@contextmanager
def _pausing(model: Any, turns: Turns) -> Iterator[Any]:
    """Passes pause before and after each layer; gives the longest list of layers, by parameters."""
    lists = _outermost(model)
    hooks = []
    for layer in (layer for some in lists for layer in some):
        hooks.append(layer.register_forward_pre_hook(lambda *_: turns.pause()))
        hooks.append(layer.register_forward_hook(lambda *_: turns.pause()))
    try:
        yield max(lists, key=lambda some: sum(p.numel() for p in some.parameters()), default=[])
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(module: Any) -> list[Any]:
    """The lists of layers that lie in no other list."""
    import torch

    if isinstance(module, torch.nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _count(layers: Sequence[Any], done: Callable[[], None], num_passes: int) -> list[Any]:
    """Says when the last pass has gone through a layer."""
    calls = [0]

    def after(*_: Any) -> None:
        calls[0] += 1
        if calls[0] % num_passes == 0:
            done()

    return [layer.register_forward_hook(after) for layer in layers]
