"""What an adapter holds of a fine-tune's outputs: ||D' X.T||^2 of ||D X.T||^2, for inputs X held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.ground.model_modules import Kind
from pipeline.ground.parallel import plain_arithmetic
from pipeline.ground.progress import Progress
from pipeline.ground.report import Finding, Gate, Status
from pipeline.merging.pieces import Merged
from pipeline.weight import Checkpoint, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.extraction.decomposing import Decomposed
    from pipeline.extraction.parameters import Parameter
    from pipeline.extraction.result import Extraction
    from pipeline.ground.whitening import Inputs

SLACK = 1e-3  # of the outputs' energy: what rounding factors to 16 bits may cost
HELD, PLAIN, FITTED = "outputs_captured", "outputs_captured_plain", "outputs_fitted"


def in_outputs(rank: int, matrices: Sequence[Decomposed]) -> dict[str, float]:
    """Shares of outputs' energy, for the report; of a parameter that is decomposed by its weights, none."""
    [*seen] = [d.seen for d in matrices if d.seen]
    if not seen:
        return {}
    [one] = seen
    total = one.held_energy or 1.0
    return {
        HELD: sum(one.held[:rank]) / total,
        PLAIN: sum(one.held_plain[:rank]) / total,
        FITTED: one.captured(rank),
    }


def told(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What weighing outputs won on text that was held out, and where it did harm."""
    seen = _seen(facts)
    if not seen:
        return []
    found = [
        Finding(
            f"of what the fine-tune changes in the outputs of {len(seen)} modules, on text held out, "
            f"{_mean(seen, HELD):.2%} is kept, and {_mean(seen, PLAIN):.2%} would be at the same ranks by "
            "weights alone"
        )
    ]
    worse = [name for name, f in seen.items() if f[HELD] < f[PLAIN]]
    if worse:
        first = max(worse, key=lambda name: seen[name][PLAIN] - seen[name][HELD])
        found.append(
            Finding(
                f"by weights alone more of the outputs of {first} would be kept ({seen[first][PLAIN]:.2%} "
                f"instead of {seen[first][HELD]:.2%}, {len(worse)} modules); a longer text for "
                "extract.calibration may help"
            )
        )
    return found


def held_on_average(facts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The share of the change of outputs that is kept, over modules; None where no outputs decided."""
    seen = _seen(facts)
    return _mean(seen, HELD) if seen else None


def _seen(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: f for name, f in facts.items() if HELD in f and f["rank"]}


def _mean(facts: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return float(sum(f[key] for f in facts.values())) / len(facts)


def recomputed(extraction: Extraction, merged: Checkpoint[Weight]) -> tuple[Gate, dict[str, float]]:
    """Whether each module's outputs hold what the extraction says, by what a merge would add; the shares."""
    weights = {weight.name: weight for weight in merged.weights}
    seen = [
        p for p in extraction.chosen.lora if p.name in extraction.inputs and extraction.facts[p.name]["rank"]
    ]
    found: dict[str, float] = {}
    sizes = {p.name: 4 * p.matrix[0] * p.matrix[1] for p in seen}
    with plain_arithmetic(), Progress("checking outputs", sum(sizes.values())) as bar:
        for p in seen:
            found[p.name] = _captured(p, weights, extraction.inputs[p.name])
            bar.advance(sizes[p.name])
    wanted = "as extracted, recomputed from the files"
    wrong = [name for name, share in found.items() if share < extraction.facts[name][HELD] - SLACK]
    if wrong:
        claimed = extraction.facts[wrong[0]][HELD]
        told = f"{wrong[0]} holds {found[wrong[0]]:.4%}, not {claimed:.4%} ({len(wrong)} modules)"
        return Gate("outputs", Status.failed, told, wanted), found
    mean = sum(found.values()) / max(len(found), 1)
    plain = sum(extraction.facts[name][PLAIN] for name in found) / max(len(found), 1)
    told = f"{mean:.4%} of the change of outputs on average; {plain:.4%} by weights alone"
    return Gate("outputs", Status.passed, told, wanted), found


def _captured(p: Parameter, weights: Mapping[str, Weight], inputs: Inputs) -> float:
    """1 - ||(D - D') X.T||^2 / ||D X.T||^2, with D' the sum that the adapter adds."""
    import torch

    X = inputs.held_out()
    turned = p.place.kind is Kind.conv1d  # (in, out): rows are inputs
    outputs = [torch.zeros(len(X), p.matrix[1]) for _ in range(2)] if turned else []
    energies = [0.0, 0.0]  # of D, of what is missed
    for start, stop, D, missed in _tiles(p, weights):
        for n, part in enumerate((D, missed)):
            if turned:
                outputs[n] += X[:, start:stop] @ part
            else:
                energies[n] += float((X @ part.T).double().square().sum())
    if turned:
        energies = [float(part.double().square().sum()) for part in outputs]
    return 1 - energies[1] / energies[0] if energies[0] else 1.0


def _tiles(p: Parameter, weights: Mapping[str, Weight]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Rows of the difference, and of what the adapter misses of it."""
    [slices] = p.matrices
    [part] = slices
    weight = weights.get(part.pair.name, part.pair.base)
    with part.pair.open("cpu") as rows, weight.open("cpu") as tiles:
        for start, stop in part.pair.grid(part.start, part.stop):
            D = rows(start, stop)[2]
            added = tiles(start, stop).delta if isinstance(weight, Merged) else None
            yield start, stop, D, D if added is None else D - added.float()
