"""The comparison of logits for models larger than memory: one layer of weights at a time.

All passes - each sequence through base and adapter, each through the base alone, and the one that measures
the noise - go through a layer before any goes on to the next, so a weight is read once for all of them. The
operations and their shapes are those of the comparison in memory, hence so are the bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground import logits
from pipeline.ground.deferred import cell_of
from pipeline.ground.divergence import figures, positions
from pipeline.ground.errors import PipelineError
from pipeline.ground.libraries import quiet
from pipeline.ground.logits import CannotCompare, MergedDoesNotRun, Models, Outcome
from pipeline.ground.progress import Progress
from pipeline.ground.turns import Turns
from pipeline.ground.units import show_bytes
from pipeline.ground.unread import Stream

if TYPE_CHECKING:
    from torch import Tensor

_NO_ANSWERS = (
    "base, adapter and merged model answered no prompt: layer by layer, each token would read them anew"
)
_TOGETHER = 8  # sequences whose passes take turns: their hidden states, logits and threads are held at once


class DoesNotFit(PipelineError):  # noqa: N818  it reads like what happened
    """Not even one weight at a time fits into memory."""


@dataclass(frozen=True)
class Layers:
    """How models are run: the stream that their weights come from, and the bytes that all may take."""

    stream: Stream
    memory: int
    device: str


def compare(
    models: Models, layers: Layers, text: str, num_tokens: int, prompts: Sequence[str], first: int = 0
) -> Outcome:
    """As `logits.compare`, of models whose weights are deferred; prompts are not answered."""
    import torch

    with quiet(), torch.inference_mode():
        config, tokenizer, cls = logits.prepare(models.merged)
        assumed = [_NO_ANSWERS] if prompts else []
        tokens = logits.tokens_of(tokenizer, text, config, num_tokens, assumed, first)
        layers.stream.room = 0
        try:
            model = _ready(logits.adapted(models, cls, layers.device), layers, tokens)
            with_adapter, without, floor = _reference(model, tokens, layers)
        except DoesNotFit:
            raise
        except Exception as error:  # whatever transformers or PEFT raise about base and adapter
            raise CannotCompare(logits.reason(error)) from error
        del model
        gc.collect()
        try:
            assert models.load_merged
            merged = _ready(models.load_merged(cls).eval().to(layers.device), layers, tokens)
            with_merged = outputs(merged, tokens, layers, "merged model")
        except DoesNotFit:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:  # says nothing about the merge
            raise CannotCompare(logits.reason(error)) from error
        except Exception as error:
            raise MergedDoesNotRun(logits.reason(error)) from error
        next_tokens = logits.following(tokens, cls, len(with_merged))
        seen = positions(with_adapter, without, with_merged, next_tokens)
    told = {"tokens": tokens.numel(), "layer_by_layer": True, "weights_held": layers.stream.most}
    return Outcome({**figures(seen), "kl_floor": floor, **told}, None, assumed, seen)


def _reference(model: Any, tokens: Tensor, layers: Layers) -> tuple[Tensor, Tensor, float]:
    """Predictions with the adapter and without, and the noise of the evaluation."""
    import torch

    turned_on = [True]

    def adapters(on: bool) -> Callable[[], None]:
        def switch() -> None:
            if turned_on != [on]:
                tuner = model.base_model
                (tuner.enable_adapter_layers if on else tuner.disable_adapter_layers)()
                turned_on[0] = on

        return switch

    with_adapter, without, noisy = [], [], None
    for some in tokens.split(_TOGETHER):
        passes = [(adapters(on), sequence[None]) for on in (True, False) for sequence in some]
        if noisy is None:
            passes.insert(len(some), (adapters(True), logits.side_by_side(tokens)))
        found = _run(model, passes, layers, "base and adapter")
        if noisy is None:
            noisy = found.pop(len(some))
        with_adapter += found[: len(some)]
        without += found[len(some) :]
    assert noisy is not None
    alone = torch.cat(with_adapter)
    return alone, torch.cat(without), logits.apart(alone, noisy)


def outputs(model: Any, tokens: Tensor, layers: Layers, what: str) -> Tensor:
    """As `logits.outputs`."""
    import torch

    found = []
    for some in tokens.split(_TOGETHER):
        found += _run(model, [(lambda: None, sequence[None]) for sequence in some], layers, what)
    return torch.cat(found)


def _ready(model: Any, layers: Layers, tokens: Tensor) -> Any:
    """The model, with room for its weights in the stream; DoesNotFit where there is none."""
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
    if least > layers.memory:
        takes, free = show_bytes(least), show_bytes(layers.memory)
        raise DoesNotFit(f"that takes {takes} of memory layer by layer, {free} are free")
    layers.stream.drop()
    layers.stream.room = layers.memory - beside
    return model


def _run(model: Any, passes: Sequence[tuple[Callable[[], Any], Tensor]], layers: Layers, what: str) -> Any:
    """What the model predicts in each pass."""
    import torch

    turns, num_threads = Turns(), torch.get_num_threads()

    def work(ids: Tensor) -> Callable[[], Tensor]:
        def predict() -> Tensor:
            torch.set_num_threads(num_threads)
            with torch.inference_mode():
                return logits.predictions(model, ids)

        return predict

    with _pausing(model, turns) as main, Progress(f"comparing logits: {what}", len(main), "layers") as bar:
        ends = _count(main, lambda: bar.advance(1), len(passes))
        try:
            return turns.run([(before, work(ids)) for before, ids in passes], layers.stream.drop)
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
