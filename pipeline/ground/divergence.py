"""How far apart predictions are: the figures of llama.cpp's perplexity tool, with their errors.

KL divergences are in nats per token, probabilities and shares are of 1, intervals hold 95 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.ground.gates import wilson

if TYPE_CHECKING:
    from torch import Tensor

_RESAMPLES = 1000
_AT_ONCE = 50
_STRETCHES = 128  # at most, of the text, whose mean KL the report shows


def compared(
    adapter: Tensor, base: Tensor, merged: Tensor, following: Tensor | None = None
) -> dict[str, Any]:
    """Figures of `merged` against `adapter`, and of `base`, `(positions, classes)` log-probabilities each.

    `following` is the token that does follow at each position, -1 where none does.
    """
    import torch

    off, effect = divergence(adapter, merged), divergence(adapter, base)
    means = resampled(torch.stack([off, effect]))
    ratios = means[0] / means[1].clamp_min(1e-300)
    same = float((adapter.argmax(-1) == merged.argmax(-1)).double().mean())
    return {
        "kl_mean": float(off.mean()),
        "kl_interval": interval_of(means[0]),
        "kl_median": float(off.quantile(0.5)),
        "kl_p99": float(off.quantile(0.99)),
        "kl_p999": float(off.quantile(0.999)),
        "kl_p999_interval": _of_quantile(off, 0.999),
        "kl_max": float(off.max()),
        "kl_adapter_base": float(effect.mean()),
        "ratio": float(off.mean() / effect.mean().clamp_min(1e-300)),
        "ratio_interval": interval_of(ratios),
        "top1_agreement": same,
        "top1_interval": list(wilson(same, len(off))),
        "largest_difference": float((adapter - merged).abs().max()),
        "finite": bool(merged.isfinite().all()),
        "kl_along": [float(part.mean()) for part in off.tensor_split(min(_STRETCHES, len(off)))],
        **_of_the_text(adapter, base, merged, following),
    }


def _of_the_text(adapter: Tensor, base: Tensor, merged: Tensor, following: Tensor | None) -> dict[str, Any]:
    """What the models give the tokens that do follow: perplexities, and how far probabilities moved."""
    import torch

    if following is None or is_hidden(adapter):
        return {}
    known = following >= 0
    if not bool(known.any()):
        return {}
    at = following[known][:, None]
    ours, theirs, plain = (values[known].double().gather(1, at)[:, 0] for values in (adapter, merged, base))
    squares = (ours.exp() - theirs.exp()) ** 2
    change = ours - theirs  # ln of the ratio of perplexities, token by token
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
    ratio = float(torch.exp(change.mean()))
    return {
        "rms_probability": float(squares.mean().sqrt()),
        "rms_interval": [float(v) ** 0.5 for v in interval_of(resampled(squares[None])[0])],
        "perplexity_base": float(torch.exp(-plain.mean())),
        "perplexity_adapter": float(torch.exp(-ours.mean())),
        "perplexity_merged": float(torch.exp(-theirs.mean())),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": error * ratio,
    }


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
