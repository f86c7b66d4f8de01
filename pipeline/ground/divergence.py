"""How far apart predictions are: the figures of llama.cpp's perplexity tool, with their errors.

KL divergences are in nats per token, probabilities and shares are of 1, intervals hold 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from pipeline.ground.gates import wilson

if TYPE_CHECKING:
    from torch import Tensor

_RESAMPLES = 1000
_AT_ONCE = 50
_STRETCHES = 128  # at most, of the text, whose mean KL the report shows


@dataclass(frozen=True)
class Positions:
    """What every position shows, `(positions,)` each; of the tokens that follow those that are known."""

    off: Tensor  # KL(adapter || merged)
    effect: Tensor  # KL(adapter || base)
    same: Tensor  # bool: the same top token
    following: (
        Tensor  # (3, known) log-probabilities that adapter, merged and base give the token that follows
    )
    largest: float  # difference of any log-probability
    finite: bool

    @classmethod
    def together(cls, parts: Sequence[Positions]) -> Positions:
        """Those of several stretches of text."""
        import torch

        return cls(
            torch.cat([p.off for p in parts]),
            torch.cat([p.effect for p in parts]),
            torch.cat([p.same for p in parts]),
            torch.cat([p.following for p in parts], 1),
            max(p.largest for p in parts),
            all(p.finite for p in parts),
        )


def positions(adapter: Tensor, base: Tensor, merged: Tensor, following: Tensor | None = None) -> Positions:
    """Positions of `merged` against `adapter`, and of `base`, `(positions, classes)` log-probabilities each.

    `following` is the token that does follow at each position, -1 where none does.
    """
    import torch

    known = adapter.new_zeros(len(adapter)).bool()
    if following is not None and not is_hidden(adapter):
        known = following >= 0
    at = following[known][:, None] if following is not None and bool(known.any()) else None
    given = [v[known].double().gather(1, at)[:, 0] for v in (adapter, merged, base)] if at is not None else []
    return Positions(
        divergence(adapter, merged),
        divergence(adapter, base),
        adapter.argmax(-1) == merged.argmax(-1),
        torch.stack(given) if given else torch.zeros(3, 0, dtype=torch.float64),
        float((adapter - merged).abs().max()),
        bool(merged.isfinite().all()),
    )


def compared(
    adapter: Tensor, base: Tensor, merged: Tensor, following: Tensor | None = None
) -> dict[str, Any]:
    """Figures of all positions; the arguments are those of `positions`."""
    return figures(positions(adapter, base, merged, following))


def figures(at: Positions) -> dict[str, Any]:
    """Figures over all positions; `..._error` is one standard error."""
    import torch

    off, effect, count = at.off, at.effect, len(at.off)
    means = resampled(torch.stack([off, effect]))
    ratios = means[0] / means[1].clamp_min(1e-300)
    same = float(at.same.double().mean())
    return {
        "kl_mean": float(off.mean()),
        "kl_error": _error(off),
        "kl_interval": interval_of(means[0]),
        "kl_median": float(off.quantile(0.5)),
        "kl_p99": float(off.quantile(0.99)),
        "kl_p999": float(off.quantile(0.999)),
        "kl_p999_interval": _of_quantile(off, 0.999),
        "kl_max": float(off.max()),
        "kl_adapter_base": float(effect.mean()),
        "kl_adapter_base_error": _error(effect),
        "ratio": float(off.mean() / effect.mean().clamp_min(1e-300)),
        "ratio_error": float(ratios.std()),
        "ratio_interval": interval_of(ratios),
        "top1_agreement": same,
        "top1_error": sqrt(same * (1 - same) / max(count - 1, 1)),
        "top1_interval": list(wilson(same, count)),
        "largest_difference": at.largest,
        "finite": at.finite,
        "kl_along": [float(part.mean()) for part in off.tensor_split(min(_STRETCHES, count))],
        **_of_the_text(at.following),
    }


def _error(values: Tensor) -> float:
    """The standard error of their mean."""
    return float(values.std()) / sqrt(len(values)) if len(values) > 1 else 0.0


def _of_the_text(following: Tensor) -> dict[str, Any]:
    """What the models give the tokens that do follow: perplexities, and how far probabilities moved."""
    import torch

    if not following.shape[1]:
        return {}
    ours, theirs, plain = following
    moved = theirs.exp() - ours.exp()
    squares = moved**2
    change = ours - theirs  # ln of the ratio of perplexities, token by token
    ratio, rms = float(torch.exp(change.mean())), float(squares.mean().sqrt())
    perplexities = {"base": plain, "adapter": ours, "merged": theirs}
    found = {f"perplexity_{who}": float(torch.exp(-values.mean())) for who, values in perplexities.items()}
    errors = {
        f"perplexity_{who}_error": found[f"perplexity_{who}"] * _error(values)
        for who, values in perplexities.items()
    }
    return {
        "rms_probability": rms,
        "rms_error": _error(squares) / (2 * rms) if rms else 0.0,
        "rms_interval": [float(v) ** 0.5 for v in interval_of(resampled(squares[None])[0])],
        "probability_change": _shares(moved),
        **found,
        **errors,
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": _error(change) * ratio,
        "log_perplexity_correlation": _correlation(ours, theirs),
    }


def _shares(moved: Tensor) -> dict[str, float]:
    """By how much the probability of the token that follows moved: mean and quantiles."""
    quantiles = {"min": 0.0, "p1": 0.01, "p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    told = {name: float(moved.quantile(share)) for name, share in quantiles.items()}
    return {"mean": float(moved.mean()), "error": _error(moved), **told}


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's; None where either does not vary."""
    x, y = one - one.mean(), other - other.mean()
    size = float(x.norm() * y.norm())
    return float(x.dot(y)) / size if size else None


def is_hidden(values: Tensor) -> bool:
    """Whether these are hidden states: no log-probability is positive."""
    return bool((values > 0).any())


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, float64; half the squared distance for hidden states."""
    import torch

    parts = []
    for some_p, some_q in zip(p.split(64), q.split(64), strict=True):
        P, Q = some_p.double(), some_q.double()
        if is_hidden(P):
            parts.append(((P - Q) ** 2).sum(-1) / 2)
        else:
            P, Q = P - P.logsumexp(-1, keepdim=True), Q - Q.logsumexp(-1, keepdim=True)
            parts.append((P.exp() * (P - Q)).sum(-1).clamp_min(0))
    return torch.cat(parts)


def resampled(rows: Tensor) -> Tensor:
    """Means of `rows`, `(kinds, positions)`, over positions drawn with replacement: `(kinds, resamples)`."""
    import torch

    random, count = torch.Generator().manual_seed(0), rows.shape[1]
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        picks = torch.randint(count, (_AT_ONCE, count), generator=random)
        means.append(rows[:, picks].mean(-1))
    return torch.cat(means, 1)


def interval_of(drawn: Tensor) -> list[float]:
    import torch

    return [float(v) for v in drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))]


def _of_quantile(values: Tensor, share: float) -> list[float]:
    """The interval of a quantile, by the order statistics whose ranks the binomial distribution gives."""
    ordered, count = values.sort().values, len(values)
    spread = 1.96 * (count * share * (1 - share)) ** 0.5
    ranks = (int(count * share - spread) - 1, int(count * share + spread) + 1)
    return [float(ordered[min(max(rank, 0), count - 1)]) for rank in ranks]
