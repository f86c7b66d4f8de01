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
    drawn = [figure(c.caption, charts.drawn(c.name, c.draw)) for c in layers_charts(weights)]
    if not drawn:
        return None
    key, probed = _key(weights), _probed(weights)
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
    return section("Layers on probes", element("div", *drawn, table(columns, rows, "wide"), class_="charts"))


def layers_charts(weights: Weights) -> list[charts.Chart]:
    """The heat map, if anything was probed."""
    probed, key = _probed(weights), _key(weights)
    if not probed:
        return []
    where = "inputs along the rows of A" if key.startswith("aligned") else "random inputs"
    negative = {name: {key: -f[key]} for name, f in probed.items() if key in f}  # a grid takes the least
    layers, modules, values = grid(negative, key)
    worst = [[None if v is None else -v for v in row] for row in values]
    draw = partial(charts.heat_map, layers, modules, worst, "||E x|| / ||D x||")
    caption = f"What a layer is off by on {where}, of what the adapter adds there"
    return [charts.Chart("outerr", caption, draw)]


def _probed(weights: Weights) -> Weights:
    return {n: f for n, f in weights.items() if f.get("aligned_outerr", f.get("random_outerr")) is not None}


def _key(weights: Weights) -> str:
    """The figure that is shown: along A, where any weight has one."""
    return "aligned_outerr" if any("aligned_outerr" in f for f in weights.values()) else "random_outerr"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"
