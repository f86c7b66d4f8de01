"""The part of report.html that shows what a merge did to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.ground import charts
from pipeline.ground.markup import Column, Markup, element, figure, section, table

_MOST_SPREADS = 12  # weights whose distribution is drawn; the table has all
_ULP_EDGES = [
    "0-.05",
    ".05-.1",
    ".1-.15",
    ".15-.2",
    ".2-.25",
    ".25-.3",
    ".3-.35",
    ".35-.4",
    ".4-.45",
    ".45-.5",
]
_BEYOND = [".5-1", "> 1"]

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
    shown: list[Markup] = []
    for key, caption, limits, logarithmic in (
        ("retained", "Share of the delta that survived rounding, by layer and module", True, False),
        ("verified_retained", "Share of the delta found in the files, by layer and module", True, False),
        ("relative_norm", "Size of the delta against the weight, by layer and module", False, True),
    ):
        layers, modules, values = grid(weights, key)
        flat = [v for row in values for v in row if v is not None]
        if not flat or (key == "verified_retained" and shown):
            continue
        span = (min(0.9, max(min(flat), 0.0)), 1.0) if limits else None
        chart = partial(
            charts.heat_map, layers, modules, values, "1 = all of it" if limits else "||D|| / ||W||",
            limits=span, logarithmic=logarithmic,
        )  # fmt: skip
        shown.append(figure(caption, charts.drawn(key, chart)))
    spread = [
        charts.Spread(name.removesuffix(".weight"), facts["before"], facts["after"])
        for name, facts in sorted(weights.items(), key=lambda item: -(item[1].get("relative_norm") or 0))
        if "before" in facts
    ][:_MOST_SPREADS]
    if spread:
        caption = "Values before (grey) and after (blue): least to most, and one deviation about the mean"
        caption += "" if len(spread) < _MOST_SPREADS else f"; the {_MOST_SPREADS} weights that move most"
        shown.append(
            figure(caption, charts.drawn("spread", partial(charts.spreads, _short(spread), "value")))
        )
    if ulps := [w["ulps"] for w in weights.values() if w.get("ulps")]:
        counts = [sum(column) for column in zip(*ulps, strict=True)]
        caption = f"Distance from a float64 recomputation, {sum(counts):,} elements"
        chart = partial(charts.histogram, _ULP_EDGES + _BEYOND, counts, "units in the last place", 10)
        shown.append(figure(caption, charts.drawn("ulp", chart)))
    return section(
        "What the merge did to the weights", element("div", *shown, class_="charts"), _all(weights)
    )


def _short(spread: list[charts.Spread]) -> list[charts.Spread]:
    """Names without the path that all share."""
    names = [s.name.split(".") for s in spread]
    same = 0
    while len(names) > 1 and all(len(n) > same + 1 and n[same] == names[0][same] for n in names):
        same += 1
    return [s._replace(name=".".join(n[same:])[-34:]) for s, n in zip(spread, names, strict=True)]


def _all(weights: Weights) -> Markup:
    keys = {
        "retained": "retained",
        "changed_fraction": "changed",
        "relative_norm": "||D||/||W||",
        "worst_ulp": "ulp",
    }
    keys = {key: head for key, head in keys.items() if any(w.get(key) is not None for w in weights.values())}
    rows = [
        (name, *("" if facts.get(key) is None else f"{facts[key]:.4g}" for key in keys))
        for name, facts in weights.items()
    ]
    columns = [Column("weight"), *(Column(head, number=True) for head in keys.values())]
    listed = table(columns, rows, "wide")
    return element("details", element("summary", f"All {len(rows)} weights as a table"), listed)
