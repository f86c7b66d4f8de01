"""The parts of report.html that show what models say: figures of their predictions, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.markup import Column, Markup, element, figure, section, table

Figures = Mapping[str, Any]

_FIGURES = {
    "ratio": "KL(adapter || merged) / KL(adapter || base)",
    "ratio_error": "its standard error",
    "ratio_interval": "its 95 % interval",
    "kl_adapter_base": "KL(adapter || base), mean",
    "kl_mean": "KL(adapter || merged), mean",
    "kl_floor": "of it, noise of the evaluation itself",
    "kl_interval": "95 % interval of the mean",
    "kl_median": "median",
    "kl_p99": "99th percentile",
    "kl_p999": "99.9th percentile",
    "kl_max": "largest",
    "top1_agreement": "same top token",
    "top1_interval": "its 95 % interval",
    "rms_probability": "RMS change of a token's probability",
    "largest_difference": "largest difference of a log-probability",
    "perplexity_base": "perplexity, base",
    "perplexity_adapter": "perplexity, adapter",
    "perplexity_merged": "perplexity, merged",
    "perplexity_ratio": "merged / adapter",
    "perplexity_ratio_error": "its standard error",
    "log_perplexity_correlation": "correlation of ln perplexity, token by token",
    "tokens": "tokens",
}
_EXTRACTED = {
    "ratio": "KL(fine-tune || extracted) / KL(fine-tune || base)",
    "ratio_interval": "its 95 % interval",
    "kl_finetune_base": "KL(fine-tune || base), mean",
    "kl_finetune_extracted": "KL(fine-tune || extracted), mean",
    "top1_agreement": "same top token",
    "tokens": "tokens",
}
_SHARES = ("top1_agreement", "top1_interval")


def logits_section(figures: Figures | None) -> Markup | None:
    """What the merge changed in the predictions; None where nothing was compared."""
    if not figures:
        return None
    drawn = [figure(c.caption, charts.drawn(c.name, c.draw)) for c in logits_charts(figures)]
    parts = element("div", _table(figures, _FIGURES), *drawn, class_="charts")
    return section("The merged model against base + adapter", parts)


def logits_charts(figures: Figures | None) -> list[charts.Chart]:
    """The divergence along the text, if it was taken."""
    if not figures or not figures.get("kl_along"):
        return []
    values = figures["kl_along"]
    level, length = figures["kl_adapter_base"], figures.get("tokens", len(values))
    draw = partial(charts.along, values, length, "token of the text", "KL(adapter || merged), nats", level)
    caption = "What the merge changed in the predictions, along the text; dashed: what the adapter changes"
    return [charts.Chart("kl", caption, draw)]


def extraction_figures(figures: Figures | None) -> Markup | None:
    """How near base + extracted adapter is to the fine-tune."""
    return _table(figures, _EXTRACTED) if figures else None


def _table(figures: Figures, labels: Mapping[str, str]) -> Markup:
    rows = [
        (label, _shown(key, figures[key])) for key, label in labels.items() if figures.get(key) is not None
    ]
    return table([Column("nats per token"), Column("", number=True)], rows)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(key, inner) for inner in value)
    if key in _SHARES:
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def answers_section(answers: Sequence[Mapping[str, str]] | None) -> Markup | None:
    """What each model says to each prompt."""
    if not answers:
        return None
    parts: list[Markup] = []
    for said in answers:
        columns = [element("div", element("b", who), text) for who, text in said.items() if who != "prompt"]
        parts.append(element("p", element("b", "prompt "), said.get("prompt", ""), class_="prompt"))
        parts.append(element("div", *columns, class_="answers"))
    return section("Answers", *parts)
