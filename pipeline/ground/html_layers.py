"""The part of report.html that shows what the layers make of probes: ||E x|| / ||D x||."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.html_weights import Weights, grid
from pipeline.ground.markup import Column, Markup, element, figure, section, table

_SHOWN = 10  # weights that are listed, the farthest off first


def layers_section(weights: Weights) -> Markup | None:
    """A heat map of the worst at each place, a table of the worst of all; None where nothing was probed."""
    probed = {n: f for n, f in weights.items() if f.get("aligned_outerr", f.get("random_outerr")) is not None}
    if not probed:
        return None
    key = "aligned_outerr" if any("aligned_outerr" in f for f in probed.values()) else "random_outerr"
    where = "inputs along the rows of A" if key.startswith("aligned") else "random inputs"
    negative = {name: {key: -f[key]} for name, f in probed.items() if key in f}  # a grid takes the least
    layers, modules, values = grid(negative, key)
    worst = [[None if v is None else -v for v in row] for row in values]
    chart = partial(charts.heat_map, layers, modules, worst, "||E x|| / ||D x||")
    caption = f"What a layer is off by on {where}, of what the adapter adds there"
    farthest = sorted(probed.items(), key=lambda item: -item[1].get(key, 0.0))[:_SHOWN]
    columns = [Column("weight")]
    columns += [
        Column(head, number=True) for head in ("along A", "95 %", "one rounding alone", "random inputs")
    ]
    rows = [
        (
            name,
            _shown(facts.get("aligned_outerr")),
            " to ".join(_shown(v) for v in facts.get("aligned_outerr_interval", ())),
            _shown(facts.get("aligned_outerr_of_rounding")),
            _shown(facts.get("random_outerr")),
        )
        for name, facts in farthest
    ]
    drawn = figure(caption, charts.drawn("outerr", chart))
    return section("Layers on probes", element("div", drawn, table(columns, rows, "wide"), class_="charts"))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"
