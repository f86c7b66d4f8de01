"""The layers of an output on probes: how far each merged matrix answers from base + delta.

Unless a recipe sets a limit, a layer fails beyond LIMIT and beyond what one rounding to nearest comes to. The
bare limit, which was measured at rank 16, would refuse merges of which every element is the nearest there is:
with ||D|| = 0.007 ||W|| at rank 64 they are off by 0.079 along A, and hold 0.998 of the delta; with 0.003 at
rank 16 by 0.11, and hold 0.94, which the gate on weights passes. What rounding costs is told as a finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.ground.deltas.delta import Delta, Turned, read_entry
from pipeline.ground.deltas.dora import Dora
from pipeline.ground.deltas.experts import Experts
from pipeline.ground.deltas.lora import Lora
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.probes import KINDS, Matrix, Outputs, aligned_probes, random_probes
from pipeline.ground.report import Gate, Status
from pipeline.merging.pieces import Merged, Placed
from pipeline.verification.recomputing import Watch, by_chance, num_matrices
from pipeline.weight import Output

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 0.05  # of what the layer adds, along A, for weights of 16 bits (spec, fidelity section 8)
_HONEST = 1.5  # times the noise of one rounding to nearest that arithmetic in 16 bits may come to
_BY_CHANCE = 2.0  # the same where it was rounded by chance, whose noise is sqrt(2) times as large


class Probed(NamedTuple):
    """A matrix of a merged weight and what it made of the probes."""

    name: str
    weight: str
    matrix: Matrix


class Probing:
    """Gathers the outputs of all merged weights while they stream past."""

    def __init__(self, output: Output, num_probes: int) -> None:
        self._count = num_probes
        self._dtypes = {w.name: w.dtype for w in output.plan.weights if not w.codes}
        self._chance = by_chance(output)
        self._found: dict[str, list[Probed]] = {}

    def of(self, weight: Merged) -> Watch:
        """Takes the rows of one weight."""
        matrices = self._found[weight.name] = list(_matrices(weight, self._count))
        fold = max(placed.fold for placed in weight.placed)
        height = weight.num_rows // len(matrices)
        dtype = torch_dtype(self._dtypes[weight.name]) if weight.name in self._dtypes else None

        def watch(start: int, stored: Tensor, base: Tensor, delta: Tensor) -> None:
            number, first = divmod(start, height)
            target = base + delta
            parts = {"off": stored - target, "made": delta}
            if dtype is not None:
                parts["best"] = target.to(dtype).double() - target
            folded = {name: part.reshape(len(part) // fold, -1) for name, part in parts.items()}
            matrices[number].matrix.add(first // fold, folded)

        return watch

    def outputs(self, kind: str) -> dict[str, tuple[str, Outputs]]:
        """By the name of the matrix: the weight it is of, and its outputs; in the order of the names."""
        found = {p.name: (p.weight, p.matrix.outputs(kind)) for ps in self._found.values() for p in ps}
        return {n: (w, o) for n, (w, o) in sorted(found.items()) if o is not None and float(o.made.sum())}

    def as_dicts(self) -> dict[str, dict[str, Any]]:
        """Figures for the report, by weight: of its matrices the one that is farthest off."""
        told: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            worst: dict[str, Outputs] = {}
            for weight, outputs in self.outputs(kind).values():
                if weight not in worst or outputs.outerr > worst[weight].outerr:
                    worst[weight] = outputs
            for weight, outputs in worst.items():
                told.setdefault(weight, {}).update(outputs.as_dict(kind))
        return told

    def judge(self, limit: float | None) -> tuple[Gate, list[str]]:
        """(gate, findings). A limit that a recipe sets holds for all; else what rounding costs is told."""
        aligned = self.outputs("aligned")
        if not aligned:
            return Gate(
                "layers", Status.skipped, "no LoRA, along which to probe", "outputs as base + delta"
            ), []
        most = LIMIT if limit is None else limit
        worst = max(aligned, key=lambda name: aligned[name][1].outerr)
        seen = f"off by {aligned[worst][1].outerr:.3g} of what the adapter adds along A at most, in {worst}"
        coded = limit is None and all(o.best is None for _, o in aligned.values())
        wanted = "reported only: the output is quantized" if coded else f"<= {most:g}, or as one rounding is"
        if limit is not None:
            wanted = f"<= {most:g}"
        beyond = {name: o for name, (_, o) in aligned.items() if o.outerr > most and o.interval[0] > most}
        failed = {name: o for name, o in beyond.items() if limit is not None or self._is_more(name, aligned)}
        if failed:
            name = max(failed, key=lambda n: failed[n].interval[0])
            low, high = failed[name].interval
            seen += f"; {name} by {low:.3g} to {high:.3g} ({len(failed)} of {len(aligned)} do not hold)"
            return Gate("layers", Status.failed, seen, wanted), []
        told = []
        rounded = {n: o for n, o in beyond.items() if o.best is not None}
        if rounded:
            name = max(rounded, key=lambda n: rounded[n].outerr)
            told.append(
                f"rounding alone changes what {len(rounded)} of {len(aligned)} layers add along A by more "
                f"than {most:g}, at most by {rounded[name].outerr:.3g} in {name}; float16 rounds less"
            )
        return Gate("layers", Status.passed, seen, wanted), told

    def _is_more(self, name: str, aligned: Mapping[str, tuple[str, Outputs]]) -> bool:
        """Whether it is farther off than its rounding explains."""
        weight, outputs = aligned[name]
        return outputs.beyond_best > (_BY_CHANCE if weight in self._chance else _HONEST)


def _matrices(weight: Merged, count: int) -> Iterator[Probed]:
    """The matrices that a weight stacks, or the one that it is, with probes for each."""
    import torch

    fold, stack = max(placed.fold for placed in weight.placed), num_matrices(weight)
    height, width = weight.num_rows // stack // fold, weight.num_columns * fold
    turned = any(_is_turned(placed.delta) for placed in weight.placed)
    for number in range(stack):
        name = f"{weight.name}[{number}]" if stack > 1 else weight.name
        size = height if turned else width
        X = [random_probes(name, size, count)]
        if (A := _inputs(weight, number, stack, size, turned)) is not None:
            X.append(aligned_probes(name, A, count))
        yield Probed(name, weight.name, Matrix(torch.cat(X, 1), KINDS[: len(X)], turned))


def _is_turned(delta: Delta) -> bool:
    if isinstance(delta, Turned):
        return True
    delta = delta.lora if isinstance(delta, Dora) else delta
    return isinstance(delta, Lora | Experts) and bool(delta.transposed)


def _inputs(weight: Merged, number: int, stack: int, size: int, turned: bool) -> Tensor | None:
    """The rows of all A that reach this matrix, `(ranks, size)`; None where there is no LoRA."""
    import torch

    height, found = weight.num_rows // stack, []
    for placed in weight.placed:
        low, high = max(placed.row, number * height), min(placed.stop, (number + 1) * height)
        A = _factor(placed, low) if low < high else None
        if A is None:
            continue
        if turned:  # its inputs are rows of the weight, of which the piece may hold some
            first = placed.rows[0] + (low - placed.row) // placed.fold
            first, begin = first % A.shape[1], (low - number * height) // placed.fold
            A, width = A[:, first:], (high - low) // placed.fold
        else:
            begin, width = placed.column * placed.fold, placed.width * placed.fold
        row = A.new_zeros(A.shape[0], size)
        if A.shape[1] < width or begin + width > size:
            return None
        row[:, begin : begin + width] = A[:, :width]
        found.append(row)
    return torch.cat(found) if found else None


def _factor(placed: Placed, row: int) -> Tensor | None:
    """A `(rank, in)` of the LoRA that reaches this row of the weight, float64."""
    delta = placed.delta.lora if isinstance(placed.delta, Dora) else placed.delta
    if isinstance(delta, Lora):
        left, right = delta.factors("cpu", "F64")
        return left.T if delta.transposed else right
    if isinstance(delta, Experts):
        A = read_entry(delta.A, "cpu", "F64").view(delta.num_experts, delta.rank, -1)
        height = delta.num_rows // delta.num_experts
        expert = (placed.rows[0] + (row - placed.row) // placed.fold) // height
        return A[expert]
    return None
