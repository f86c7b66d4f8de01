"""The part of report.html that shows what a merge did to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.markup import Column, Markup, element, figure, section, table

_MOST_SPREADS = 12  # weights whose distribution is drawn; the table has all
_ULP_TICKS = {0: "0", 2: ".1", 4: ".2", 6: ".3", 8: ".4", 10: ".5", 11: "1", 12: "more"}

Weights = Mapping[str, Mapping[str, Any]]


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a weight's name; the numbers of its experts do not tell them apart."""
    parts = name.removesuffix(".weight").split(".")
    layer = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return "other", parts[-1]
    return parts[layer], ".".join(p for p in parts[layer + 1 :] if not p.isdigit())


def grid(weights: Weights, key: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Layers, modules by the end of their names, and the least value of `key` at each."""
    found: dict[tuple[str, str], float] = {}
    for name, facts in weights.items():
        if (value := facts.get(key)) is not None:
            at = place(name)
            found[at] = min(value, found.get(at, value))
    layers = sorted(
        {layer for layer, _ in found}, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0)
    )
    modules = list(dict.fromkeys(module for _, module in found))
    ends = [module.rpartition(".")[2] for module in modules]
    names = [e if ends.count(e) == 1 else m for e, m in zip(ends, modules, strict=True)]
    return layers, names, [[found.get((layer, module)) for module in modules] for layer in layers]


def weights_section(weights: Weights) -> Markup | None:
    """Heat maps, distributions, distances from float64, and a table; None where nothing was measured."""
    if not weights:
        return None
    drawn = [figure(c.caption, charts.drawn(c.name, c.draw)) for c in weight_charts(weights)]
    keys = {
        "retained": "retained",
        "verified_retained": "found",
        "changed_fraction": "changed",
        "relative_norm": "||D||/||W||",
        "worst_ulp": "ulp",
        "verified_noise": "noise/||D||",
        "base_shift": "four bits/||D||",
    }
    listed = every_weight(weights, keys)
    return section("What the merge did to the weights", element("div", *drawn, class_="charts"), listed)


def weight_charts(weights: Weights) -> list[charts.Chart]:
    """What of these can be drawn for a merge."""
    found = [
        share_map(weights, "retained", "Share of the delta that survived rounding"),
        share_map(weights, "verified_retained", "Share of the delta found in the files"),
    ]
    shown = [chart for chart in found if chart][:1]
    found = [
        size_map(weights, "relative_norm", "Size of the delta against the weight", "||D|| / ||W||"),
        size_map(weights, "noise", "Error of the codes against the delta", "||O - T|| / ||D||"),
        size_map(
            weights, "base_shift", "Shift of the base by four bits, against the delta", "||W4 - W16|| / ||D||"
        ),
    ]
    shown += [chart for chart in found if chart]
    spread = [
        charts.Spread(name.removesuffix(".weight"), facts["before"], facts["after"])
        for name, facts in sorted(weights.items(), key=lambda item: -(item[1].get("relative_norm") or 0))
        if "before" in facts
    ][:_MOST_SPREADS]
    if spread:
        caption = "Values before (grey) and after (blue): least to most, and one deviation about the mean"
        caption += "" if len(spread) < _MOST_SPREADS else f"; the {_MOST_SPREADS} weights that move most"
        shown.append(charts.Chart("spread", caption, partial(charts.spreads, _short(spread), "value")))
    if ulps := [w["ulps"] for w in weights.values() if w.get("ulps")]:
        counts = [sum(column) for column in zip(*ulps, strict=True)]
        caption = f"Distance from a float64 recomputation, {sum(counts):,} elements"
        draw = partial(charts.histogram, counts, _ULP_TICKS, "units in the last place", 10)
        shown.append(charts.Chart("ulp", caption, draw))
    return shown


def size_map(weights: Weights, key: str, what: str, label: str) -> charts.Chart | None:
    """A map of sizes by layer and module, on a logarithmic scale."""
    layers, modules, values = grid(weights, key)
    if not any(v for row in values for v in row):
        return None
    draw = partial(charts.heat_map, layers, modules, values, label)
    return charts.Chart(key, f"{what}, by layer and module: {_span(values)}", draw)


def share_map(weights: Weights, key: str, what: str) -> charts.Chart | None:
    """A map of shares by layer and module; the caption says from where to where they go."""
    layers, modules, values = grid(weights, key)
    if not modules:
        return None
    draw = partial(charts.shares, layers, modules, values, "1 = all of it")
    return charts.Chart(key, f"{what}, by layer and module: {_span(values)}", draw)


def _span(values: list[list[float | None]]) -> str:
    flat = [v for row in values for v in row if v is not None]
    least, most = f"{min(flat):.4g}", f"{max(flat):.4g}"
    return least if least == most else f"{least} to {most}"


def _short(spread: list[charts.Spread]) -> list[charts.Spread]:
    """Names without the path that all share."""
    names = [s.name.split(".") for s in spread]
    same = 0
    while len(names) > 1 and all(len(n) > same + 1 and n[same] == names[0][same] for n in names):
        same += 1
    return [s._replace(name=".".join(n[same:])[-34:]) for s, n in zip(spread, names, strict=True)]


def every_weight(weights: Weights, keys: Mapping[str, str]) -> Markup:
    """A table of all of them, folded; `keys` gives the figures that are shown and their heads."""
    keys = {key: head for key, head in keys.items() if any(w.get(key) is not None for w in weights.values())}
    rows = [
        (name, *("" if facts.get(key) is None else f"{facts[key]:.4g}" for key in keys))
        for name, facts in weights.items()
    ]
    columns = [Column("weight"), *(Column(head, number=True) for head in keys.values())]
    listed = table(columns, rows, "wide")
    return element("details", element("summary", f"All {len(rows)} weights as a table"), listed)
