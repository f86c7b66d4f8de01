"""The part of report.html that shows what an extracted adapter holds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.html_logits import extraction_figures
from pipeline.ground.html_weights import every_weight, grid, share_map, size_map
from pipeline.ground.markup import Markup, element, figure, section

_KEYS = {
    "rank": "rank",
    "captured": "held",
    "outputs_captured": "of outputs",
    "outputs_captured_plain": "by weights alone",
    "residual": "missed",
    "noise_share": "noise",
    "largest": "largest singular value",
    "noise_edge": "noise reaches",
    "energy": "||D||²",
}


def extraction_section(extraction: Mapping[str, Any] | None) -> Markup | None:
    """What is held of every weight's change, and how near the answers come; None without an extraction."""
    if not extraction:
        return None
    drawn = [figure(c.caption, charts.drawn(c.name, c.draw)) for c in extraction_charts(extraction)]
    parts = [*drawn, extraction_figures(extraction.get("logits"))]
    shown = element("div", *(part for part in parts if part), class_="charts")
    return section(
        "What the adapter holds of the fine-tune", shown, every_weight(extraction["weights"], _KEYS)
    )


def extraction_charts(extraction: Mapping[str, Any] | None) -> list[charts.Chart]:
    """Maps of what is held of the weights and of their outputs and, where they differ, of the ranks."""
    if not extraction:
        return []
    weights = extraction["weights"]
    held = share_map(weights, "captured", "Share of the difference's energy that the adapter holds")
    answered = "Share of what changes in the outputs that the adapter holds, on text held out"
    outputs = share_map(weights, "outputs_captured", answered)
    size = size_map(weights, "energy", "Size of the difference, squared", "||D||²")
    found = [chart for chart in (held, outputs, size) if chart]
    layers, modules, values = grid(weights, "rank")
    if len({rank for row in values for rank in row if rank is not None}) > 1:
        draw = partial(charts.heat_map, layers, modules, values, "rank")
        found.append(charts.Chart("rank", "Ranks, by layer and module", draw))
    return found
