"""What is wrong with a merge that somebody else made, from samples of its weights in float64.

Every weight is read by itself: by how much of the delta is in what was stored (a least-squares fit
O - W = s D), and by whether rounding alone explains the rest. Causes are then told together, each with the
weights that it holds for (causes.py). Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ground.reference import SLACK
from pipeline.ground.rounding import round_to, ulp

if TYPE_CHECKING:
    from torch import Tensor

_LOOSE = 9.0  # squared error over that of one rounding: what arithmetic in 16 bits may come to
SAME_FACTOR = 0.02  # relative: two scales that are told to be the same
_ALIKE = 0.95  # cosine of rows that are the same up to rounding and scale
_GRID = 16  # values that a block of four-bit codes can have
_BLOCK = 64
_MOST_ALIKE = 512  # weights of one shape that are held against each other
_GLANCE = 4096  # elements of each


class Cause(Enum):
    """What may be wrong, in the order in which it is told."""

    not_finite = "not finite"
    quantized = "quantized"
    four_bit_base = "added to the base's four-bit form"
    other_base = "another base"
    not_merged = "not merged"
    scale = "scale"
    swapped = "swapped"
    permuted = "permuted"
    mixed = "mixed up"
    twice_rounded = "rounded more than once"
    touched = "touched"
    unknown = "unknown"


class Scaling(NamedTuple):
    """What a LoRA's scale is made of: alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""

    alpha: float
    rank: int
    stabilised: bool
    default_alpha: float
    default_rank: int

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.stabilised else self.rank)


@dataclass(frozen=True)
class Sample:
    """Rows of a weight, float64 `(rows, columns)`: base, what was to be added (None: nothing), stored."""

    name: str
    base: Tensor
    delta: Tensor | None
    stored: Tensor
    dtype: str  # of what is stored
    scaling: Scaling | None = None
    whole: bool = False  # all rows of the weight


@dataclass(frozen=True)
class Reading:
    """What one weight shows: a cause, or None where it is right."""

    name: str
    cause: Cause | None
    factor: float = 1.0  # how many times the delta is in it
    detail: str = ""
    uncertain: float = 0.0  # what rounding may have done to the factor


def read(sample: Sample) -> Reading:
    """The likely cause of what is wrong with one weight."""
    W, O = sample.base, sample.stored  # noqa: E741
    if not bool(O.isfinite().all()):
        return Reading(sample.name, Cause.not_finite)
    D = W.new_zeros(W.shape) if sample.delta is None else sample.delta
    target = W + D
    unit = ulp(target, sample.dtype)
    error = (O - target).abs()
    if bool((error <= unit / 2 + SLACK * (W.abs() + D.abs() + W.abs().mean())).all()):
        return Reading(sample.name, None)
    if _cuts(sample) and _on_grid(O) and not _on_grid(W):
        return Reading(sample.name, Cause.quantized)
    if narrow := _narrower(sample, target):
        return Reading(sample.name, Cause.twice_rounded, detail=narrow)
    unit = ulp(target.abs().maximum(O.abs()), sample.dtype)
    noise = float((unit * unit).sum()) / 12
    energy = float((D * D).sum())
    if not energy:
        return _untouched(sample, O - W, noise)
    E = O - W
    factor = float((E * D).sum()) / energy
    rest = float(((E - factor * D) ** 2).sum())
    uncertain = 4 * sqrt(_LOOSE * noise / energy)
    if rest <= _LOOSE * noise + (SLACK * factor) ** 2 * energy:
        if abs(factor) <= max(SAME_FACTOR, uncertain):
            return Reading(sample.name, Cause.not_merged, factor, uncertain=uncertain)
        if abs(factor - 1) <= max(SAME_FACTOR, uncertain):
            how = _rounded_how(sample, target)
            return Reading(sample.name, Cause.twice_rounded, factor, how, uncertain)
        return Reading(sample.name, Cause.scale, factor, uncertain=uncertain)
    return _unexplained(sample, E, D, target, noise)


def _untouched(sample: Sample, E: Tensor, noise: float) -> Reading:
    """A weight that the merge was to leave alone, and did not."""
    off = float((E * E).sum())
    if off <= _LOOSE * noise:
        return Reading(sample.name, Cause.twice_rounded)
    size = off / max(float((sample.base**2).sum()), 1e-300)
    return Reading(sample.name, Cause.touched, sqrt(size))


def _unexplained(sample: Sample, E: Tensor, D: Tensor, target: Tensor, noise: float) -> Reading:
    """Not the delta times a number: whose values these are."""
    name = sample.name
    if sample.whole and _is_permutation(sample.stored, target):
        return Reading(name, Cause.permuted, detail="its rows stand in another order")
    if (
        sample.delta is not None
        and sample.delta.shape[0] == sample.delta.shape[1]
        and _cosine(E, D.T) > _ALIKE
    ):
        return Reading(name, Cause.mixed, detail="the delta was added transposed")
    other = E - D
    off = nf4(sample.base) - sample.base if _cuts(sample) else None
    if off is not None and _cosine(other, off) > 0.9:
        return Reading(name, Cause.four_bit_base)
    if _in_row_space(E, D, noise):
        return Reading(name, Cause.mixed, detail="rows of A meet the wrong columns of B")
    size = sqrt(float((other * other).sum()) / max(float((sample.base**2).sum()), 1e-300))
    return Reading(name, Cause.other_base, size)


def _rounded_how(sample: Sample, target: Tensor) -> str:
    """Which extra rounding gives exactly what is stored."""
    O, W, dtype = sample.stored, sample.base, sample.dtype  # noqa: E741
    assert sample.delta is not None
    if dtype in ("BF16", "F16"):
        first = round_to(sample.delta, dtype).double()
        if bool((round_to(W + first, dtype).double() == O).double().mean() > 0.999):
            return f"the delta was rounded to {dtype} before it was added, as PEFT's safe_merge does"
    return "arithmetic in 16 bits"


def _narrower(sample: Sample, target: Tensor) -> str:
    """The dtype through which the right values went on their way to a finer one."""
    for narrow in ("BF16", "F16"):
        same = round_to(target, narrow).double() == sample.stored
        if narrow != sample.dtype and bool(same.double().mean() > 0.999):
            return f"it was rounded to {narrow} before it was stored as {sample.dtype}"
    return ""


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0


def _is_permutation(O: Tensor, target: Tensor) -> bool:  # noqa: E741
    """Whether the rows of O are those of the target up to rounding, and not all in their places."""
    import torch

    rows, others = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (O, target))
    best = (rows @ others.T).max(1)
    moved = int((best.indices != torch.arange(len(O))).sum())
    alike = bool((best.values > 0.999).all()) and len(set(best.indices.tolist())) > 0.95 * len(O)
    return alike and moved > 0.05 * len(O)


def _in_row_space(E: Tensor, D: Tensor, noise: float) -> bool:
    """Whether the rows of E are combinations of those of D, as those of any B' @ A are, up to rounding."""
    import torch

    _, S, V = torch.linalg.svd(D, full_matrices=False)
    rank = int(S.gt(S[0] * 1e-9).sum())
    if rank >= min(D.shape) / 2:
        return False
    outside = float((E - E @ V[:rank].T @ V[:rank]).square().sum())
    return outside <= _LOOSE * noise and outside < 0.1 * float(E.square().sum())


def _cuts(sample: Sample) -> bool:
    """Whether blocks of 64 in file order can be told."""
    return sample.base.shape[1] % _BLOCK == 0 or (sample.whole and sample.base.numel() % _BLOCK == 0)


def _on_grid(values: Tensor) -> bool:
    """Whether blocks along the rows hold so few values that four bits tell them apart."""
    blocks = values.reshape(-1, _BLOCK).sort(1).values
    distinct = (blocks.diff(dim=1) != 0).sum(1) + 1
    return bool(((distinct <= _GRID) & (distinct > 2)).double().mean() > 0.95)


# QLoRA, appendix E (arXiv:2305.14314)
_LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


def nf4(W: Tensor) -> Tensor:
    """W in NF4, blocks of 64 along the rows, without the second quantization of the scales."""
    import torch

    levels = W.new_tensor(_LEVELS)
    blocks = W.reshape(-1, _BLOCK)
    most = blocks.abs().amax(1, keepdim=True).clamp_min(1e-300)
    nearest = torch.bucketize(blocks / most, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * most).reshape(W.shape)


def swapped(samples: Sequence[Sample]) -> dict[str, str]:
    """Of weights of one shape, experts or layers: whose delta or whose values each got instead of its own."""
    import torch

    taken = [s for s in samples if s.delta is not None][:_MOST_ALIKE]
    if len(taken) < 2:
        return {}
    deltas, moved = (torch.stack([t.flatten()[:_GLANCE] for t in ts]) for ts in _differences(taken))
    targets = torch.stack([(s.base + s.delta).flatten()[:_GLANCE] for s in taken if s.delta is not None])
    stored = torch.stack([s.stored.flatten()[:_GLANCE] for s in taken])
    found: dict[str, str] = {}
    for ours, theirs, enough in ((moved, deltas, _ALIKE), (stored, targets, 0.999)):
        rows, others = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (ours, theirs))
        best = (rows @ others.T).max(1)
        for n, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if index != n and value > enough:
                found.setdefault(taken[n].name, taken[index].name)
    return found


def _differences(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    return [s.delta for s in samples if s.delta is not None], [s.stored - s.base for s in samples]
