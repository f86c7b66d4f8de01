"""Charts as SVG that stands inside a page: drawn by matplotlib, coloured by the page's own style.

Every chart is as wide as a phone and keeps its text as text. What is drawn in one of `_INKS` takes the
page's colour of that name, so that one drawing serves light and dark.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from math import ceil, isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 5.2  # inches of 72 units: 374 px, a phone
_LONGEST = 22  # characters of a name beside an axis
_ACROSS = 56  # characters that stand side by side below one
_FLOORS = (0.99, 0.9, 0.5, 0.0)  # where the colours of shares may begin
_AS_GOOD_AS_ALL = 1.02  # samples may show a little more than all
_MUCH_MORE = 1.5  # what the noise of codes does not reach, and a delta merged twice does
_INKS = {"ink": "#0a0b0c", "muted": "#0d0e0f", "accent": "#101112", "grid": "#131415", "bad": "#161718"}
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a $ in a module's name is a $
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-pipeline",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _INKS["muted"],
    "axes.labelcolor": _INKS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INKS["ink"],
    "xtick.color": _INKS["muted"],
    "ytick.color": _INKS["muted"],
    "grid.color": _INKS["grid"],
    "legend.frameon": False,
    "savefig.transparent": True,
}


class Chart(NamedTuple):
    """A chart that can be drawn."""

    name: str  # its ids in the page begin with it
    caption: str
    draw: Callable[[], str]


@dataclass(frozen=True)
class Plot:
    """A drawn chart: it shows itself in a notebook, and `str(plot)` is an SVG file."""

    caption: str
    svg: str = field(repr=False)

    def _repr_html_(self) -> str:
        pale = "color-mix(in srgb, currentColor {}%, transparent)"
        inks = {**_light(), "ink": "currentColor", "muted": pale.format(65), "grid": pale.format(18)}
        style = "".join(f"--{name}: {ink}; " for name, ink in inks.items())
        caption = f"<figcaption>{escape(self.caption)}</figcaption>"
        return f'<figure style="{style}max-width: 36rem; margin: 0">{caption}{self.svg}</figure>'

    def __str__(self) -> str:
        drawing = self.svg
        for name, ink in _light().items():
            drawing = drawing.replace(f"var(--{name})", ink)
        return drawing


def _light() -> dict[str, str]:
    """The page's own colours of the inks, by day."""
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    return {name: re.findall(rf"--{name}: ([^;]+);", style)[0] for name in _INKS}


def plotted(charts: Sequence[Chart]) -> dict[str, Plot]:
    """The charts that can be drawn here, by their names."""
    made = ((chart, drawn(chart.name, chart.draw)) for chart in charts)
    return {chart.name: Plot(chart.caption, svg) for chart, svg in made if svg is not None}


class Spread(NamedTuple):
    """Where the values of a weight lie, before and after the merge: min, max, mean, std."""

    name: str
    before: dict[str, float]
    after: dict[str, float]


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str
) -> str:
    """A cell for each row and column on a logarithmic scale, empty where there is no value."""
    from matplotlib.colors import LogNorm

    table = _table(values)
    high = float(table.max())
    low = max(float(table.min()), high * 1e-6, 1e-300)
    return _cells(rows, columns, table, label, LogNorm(low, max(high, low * 1.1)), "viridis")


def shares(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str
) -> str:
    """The same for shares, of which 1 is right: the less the darker, and red what is more than 1."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm

    table = _table(values)
    least, most = float(table.min()), float(table.max())
    low = next((floor for floor in _FLOORS if least >= floor), least)
    if most <= _AS_GOOD_AS_ALL:
        return _cells(rows, columns, table, label, Normalize(low, 1), "viridis")
    below = [colormaps["viridis"](n / 16) for n in range(17)]
    above = [colormaps["YlOrRd"](0.25 + 0.75 * n / 16) for n in range(1, 17)]
    colours = LinearSegmentedColormap.from_list("shares", [*below, *above])
    return _cells(rows, columns, table, label, TwoSlopeNorm(1, low, max(most, _MUCH_MORE)), colours)


def _table(values: Sequence[Sequence[float | None]]) -> Any:
    import numpy as np

    return np.ma.masked_invalid([[np.nan if v is None else v for v in row] for row in values])


def _cells(rows: Sequence[str], columns: Sequence[str], table: Any, label: str, norm: Any, cmap: Any) -> str:
    columns = [_short(name) for name in columns]
    flat = sum(len(name) + 2 for name in columns) <= _ACROSS
    height = 1.2 + min(max(0.17 * len(rows), 0.6), 9) + (0.2 if flat else 0.06 * max(map(len, columns)))
    figure, axes = _figure(height)
    mesh = axes.pcolormesh(table, norm=norm, cmap=cmap, edgecolors="face", linewidth=0.5)
    axes.invert_yaxis()
    every = ceil(len(rows) / (height / 0.2))
    shown = [n for n in range(len(rows)) if n % every == 0 or not rows[n].isdigit()]
    axes.set_yticks([n + 0.5 for n in shown], [rows[n] for n in shown])
    turned = {} if flat else {"rotation": 40, "ha": "right"}
    axes.set_xticks([n + 0.5 for n in range(len(columns))], list(columns), **turned)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=40, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.set_label(label)
    if type(norm).__name__ == "LogNorm":
        _plain(bar.ax.xaxis)
    return _svg(figure)


def histogram(counts: Sequence[int], ticks: Mapping[int, str], label: str, num_good: int) -> str:
    """Bars of shares, ticks where bars end; those after the first `num_good` are drawn as bad."""
    figure, axes = _figure(2.2)
    total = max(sum(counts), 1)
    colours = [_INKS["accent"] if n < num_good else _INKS["bad"] for n in range(len(counts))]
    axes.bar(range(len(counts)), [100 * c / total for c in counts], color=colours, width=0.9)
    axes.set_xticks([at - 0.5 for at in ticks], list(ticks.values()))
    axes.set_xlabel(label)
    axes.set_ylabel("% of elements")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return _svg(figure)


def spreads(weights: Sequence[Spread], label: str) -> str:
    """Two bars for each weight, before above after: thin from least to most, thick a deviation each way."""
    figure, axes = _figure(0.9 + 0.36 * len(weights))
    for row, weight in enumerate(weights):
        for shift, facts, ink in ((-0.16, weight.before, "muted"), (0.16, weight.after, "accent")):
            mean, std, at = facts["mean"], facts["std"], row + shift
            axes.plot([facts["min"], facts["max"]], [at, at], color=_INKS[ink], linewidth=1)
            axes.plot([mean - std, mean + std], [at, at], color=_INKS[ink], linewidth=4)
    axes.set_yticks(range(len(weights)), [weight.name for weight in weights], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return _svg(figure)


def along(values: Sequence[float], length: int, xlabel: str, ylabel: str, level: float = 0.0) -> str:
    """Means of equal stretches of a text of that length, on a logarithmic scale; a level drawn across."""
    figure, axes = _figure(2.4)
    at = [(n + 0.5) * length / len(values) for n in range(len(values))]
    axes.plot(at, [max(v, 1e-12) for v in values], color=_INKS["accent"], linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlim(0, length)
    if level > 0:
        axes.axhline(level, color=_INKS["muted"], linewidth=1, linestyle="--")
    _plain(axes.yaxis, every_decade=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return _svg(figure)


def points(named: Sequence[tuple[str, float, float]], xlabel: str, ylabel: str) -> str:
    """Points (name, x, y) by their numbers, y on a logarithmic scale where it spans decades."""
    figure, axes = _figure(3.0)
    ys = [y for _, _, y in named if y > 0 and isfinite(y)]
    together: dict[tuple[str, str], list[str]] = {}  # numbers of points that cover each other
    for number, (_, x, y) in enumerate(named, 1):
        axes.plot([x], [y], "o", color=_INKS["accent"], markersize=5)
        together.setdefault((f"{x:.2g}", f"{y:.1g}"), []).append(str(number))
    for number, (_, x, y) in enumerate(named, 1):
        numbers = together[f"{x:.2g}", f"{y:.1g}"]
        if numbers[0] == str(number):
            axes.annotate(", ".join(numbers), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    if len(ys) == len(named) and log10(max(ys) / min(ys)) > 1:
        axes.set_yscale("log")
        _plain(axes.yaxis, every_decade=True)
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    return _svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def drawn(name: str, draw: Callable[[], str]) -> str | None:
    """A chart whose ids begin with `name`; None where matplotlib cannot draw here, of whatever reason."""
    try:
        from matplotlib import rc_context

        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name in a script that the font lacks: the browser has it
            svg = draw()
    except Exception:  # a page without a chart beats a lost merge; the page says so
        return None
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain(axis: Any, every_decade: bool = False) -> None:
    """Numbers of a logarithmic axis as plain numbers, a few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1,) if every_decade else (1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    """The drawing with the page's inks, and no size but its proportions."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for name, ink in _INKS.items():
        text = text.replace(ink, f"var(--{name})")
    return text.replace("'DejaVu Sans'", "system-ui, sans-serif")
