"""What the modules of a model see of a text: the second moments of their inputs, X.T X, and some of X.

The text is cut into sequences that are run one by one, in float32; of every eight one is held out, to judge
by what was not fitted. Modules that see the same tensor (q, k and v; gate and up) share its moments. They
are summed in the order of the text, products in float32 and sums in float64, so that no bit depends on how
many sequences run at a time. As many inputs are watched in one pass over the text as there is memory for;
the others wait for the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import TYPE_CHECKING, Any

from pipeline.ground.parallel import in_order, plain_arithmetic
from pipeline.ground.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

SEQUENCE = 256  # tokens that are run together, where the model has as many positions
EVERY = 8  # one of so many sequences is held out
_TOGETHER = 4  # sequences whose inputs meet in one product
HELD_ROWS = 512  # of the inputs held out that are kept, spread over them
_FIRST_LOOK = 16  # tokens, on which it is seen who shares inputs with whom


@dataclass
class Moments:
    """Of one input, of width n, as the text goes by."""

    C: Tensor  # (n, n): the sum of x x.T
    rows: int = 0  # that it is a sum of
    held: list[Tensor] = field(default_factory=list)  # (k, n) float32 on the CPU
    passed: int = 0  # rows held out so far, kept or not

    def add(self, X: Tensor) -> None:
        """Inputs (k, n) that are fitted to."""
        if len(X):
            self.C += X.T @ X
            self.rows += len(X)

    def hold_out(self, X: Tensor, stride: int) -> None:
        """Inputs (k, n) of which every `stride`th is kept."""
        self.held.append(X[-self.passed % stride :: stride].cpu())
        self.passed += len(X)


def cut(ids: Sequence[int], length: int) -> Tensor:
    """(sequences, length) token ids, without what is left at the end."""
    import torch

    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def num_fitted(num_sequences: int, length: int) -> int:
    """Tokens of these sequences that are not held out."""
    return (num_sequences - num_sequences // EVERY) * length


def bytes_needed(width: int) -> int:
    """Memory for the moments of one input while they are summed."""
    return 8 * width * width + 4 * width * (_TOGETHER * SEQUENCE + HELD_ROWS)


def watch(
    model: Any, widths: Mapping[str, int], sequences: Tensor, workers: int, memory: int
) -> Iterator[tuple[list[str], Moments]]:
    """For each distinct input the modules that see it, with its moments; `widths` name all modules."""
    import torch

    device = str(model.device)
    dtype = torch.float32 if device.startswith("mps") else torch.float64
    with plain_arithmetic():
        sharing = _sharing(model, list(widths), sequences[0, :_FIRST_LOOK])
        passes = list(_passes({name: widths[name] for name in sharing}, memory))
        step = sequences.shape[1] * sequences.element_size()
        with Progress("calibrating", len(passes) * len(sequences) * step) as bar:
            for group in passes:
                found = {
                    name: Moments(torch.zeros(widths[name], widths[name], dtype=dtype, device=device))
                    for name in group
                }
                _pass(model, found, sequences, workers, partial(bar.advance, step))
                for name in group:
                    yield sharing[name], found.pop(name)


def _passes(widths: Mapping[str, int], memory: int) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name, width in widths.items():
        if group and used + bytes_needed(width) > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += bytes_needed(width)
    yield group


def _pass(
    model: Any,
    found: Mapping[str, Moments],
    sequences: Tensor,
    workers: int,
    done: Callable[[], None],
) -> None:
    """Runs all sequences, and sums what the modules in `found` see."""
    stride = -(-(len(sequences) // EVERY * sequences.shape[1]) // HELD_ROWS) or 1
    with _Watched(model, list(found)) as watched:
        for first in range(0, len(sequences), _TOGETHER):
            numbers = range(first, min(first + _TOGETHER, len(sequences)))
            with in_order((partial(watched.run, sequences[n]) for n in numbers), workers, workers) as runs:
                seen = []
                for run in runs:
                    seen.append({name: _rows(run.get(name, []), m) for name, m in found.items()})
                    done()
            fitted = [n - first for n in numbers if n % EVERY != EVERY - 1]
            held = [n - first for n in numbers if n % EVERY == EVERY - 1]
            tasks = (
                partial(_take, m, [seen[n][name] for n in fitted], [seen[n][name] for n in held], stride)
                for name, m in found.items()
            )
            with in_order(tasks, workers, workers) as sums:
                for _ in sums:
                    pass


def _rows(inputs: Sequence[Tensor], moments: Moments) -> Tensor:
    """(k, n): all that a module saw in one run."""
    import torch

    width = len(moments.C)
    parts = [x.reshape(-1, width).float() for x in inputs]
    if not parts:
        return torch.zeros(0, width, device=moments.C.device)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _take(moments: Moments, fitted: Sequence[Tensor], held: Sequence[Tensor], stride: int) -> None:
    import torch

    if fitted:
        moments.add(torch.cat(tuple(fitted)))
    for X in held:
        moments.hold_out(X, stride)


def _sharing(model: Any, names: Sequence[str], tokens: Tensor) -> dict[str, list[str]]:
    """The modules by the first of those that are given the same tensors as they; uncalled ones alone."""
    with _Watched(model, names, copies=False) as watched:
        seen = watched.run(tokens)  # whose references keep each id the tensor's own
    firsts: dict[tuple[int, ...], str] = {}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        tensors = tuple(id(x) for x in seen.get(name, ()))
        found[firsts.setdefault(tensors, name) if tensors else name].append(name)
    return dict(found)


class _Watched:
    """`with` it, the inputs of some modules are noted as the model runs, on each thread for itself."""

    def __init__(self, model: Any, names: Sequence[str], copies: bool = True) -> None:
        self._model, self._names, self._copies = model, names, copies
        self._seen = local()

    def __enter__(self) -> _Watched:
        self._hooks = [
            self._model.get_submodule(name).register_forward_pre_hook(
                partial(self._note, name), with_kwargs=True
            )
            for name in self._names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        self._seen.by_name[name].append(given.clone() if self._copies else given)

    def run(self, tokens: Tensor) -> dict[str, list[Tensor]]:
        """The inputs by module, in the order of its calls, of one sequence (length,)."""
        import torch

        self._seen.by_name = defaultdict(list)
        with torch.inference_mode():
            self._model(input_ids=tokens[None].to(self._model.device), use_cache=False)
        found: dict[str, list[Tensor]] = self._seen.by_name
        del self._seen.by_name
        return found
