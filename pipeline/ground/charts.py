"""Charts as SVG that stands inside a page: drawn by matplotlib, coloured by the page's own style.

Every chart is as wide as a phone and keeps its text as text. What is drawn in one of `_INKS` takes the
page's colour of that name, so that one drawing serves light and dark.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from io import StringIO
from math import ceil, isfinite, log10
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 5.2  # inches of 72 units: 374 px, a phone
_LONGEST = 22  # characters of a name beside an axis
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


class Spread(NamedTuple):
    """Where the values of a weight lie, before and after the merge: min, max, mean, std."""

    name: str
    before: dict[str, float]
    after: dict[str, float]


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> str:
    """A cell for each row and column, empty where there is no value; the label names what colour means."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    columns = [_short(name) for name in columns]
    height = 1.2 + min(max(0.17 * len(rows), 0.6), 9) + 0.06 * max(map(len, columns))
    figure, axes = _figure(height)
    table = np.ma.masked_invalid([[np.nan if v is None else v for v in row] for row in values])
    low, high = limits or (float(table.min()), float(table.max()))
    if logarithmic:
        low = max(low, high * 1e-6, 1e-300)
        norm: Normalize = LogNorm(low, max(high, low * 1.1))
    else:
        norm = Normalize(low, max(high, low + 1e-9))
    mesh = axes.pcolormesh(table, norm=norm, cmap="viridis", edgecolors="face", linewidth=0.5)
    axes.invert_yaxis()
    every = ceil(len(rows) / (height / 0.2))
    shown = [n for n in range(len(rows)) if n % every == 0 or not rows[n].isdigit()]
    axes.set_yticks([n + 0.5 for n in shown], [rows[n] for n in shown])
    axes.set_xticks([n + 0.5 for n in range(len(columns))], list(columns), rotation=40, ha="right")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=40, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.set_label(label)
    if logarithmic:
        _plain(bar.ax.xaxis)
    return _svg(figure)


def histogram(edges: Sequence[str], counts: Sequence[int], label: str, num_good: int) -> str:
    """Bars of shares; those after the first `num_good` are drawn as bad."""
    figure, axes = _figure(2.2)
    total = max(sum(counts), 1)
    colours = [_INKS["accent"] if n < num_good else _INKS["bad"] for n in range(len(counts))]
    axes.bar(range(len(counts)), [100 * c / total for c in counts], color=colours, width=0.9)
    axes.set_xticks(range(len(edges)), list(edges), rotation=40, ha="right")
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


def along(values: Sequence[float], xlabel: str, ylabel: str, level: tuple[float, str] | None = None) -> str:
    """A line of values along the text, on a logarithmic scale, with a level drawn across if there is one."""
    figure, axes = _figure(2.4)
    axes.plot(range(len(values)), [max(v, 1e-12) for v in values], color=_INKS["accent"], linewidth=1.2)
    if level and level[0] > 0:
        axes.axhline(level[0], color=_INKS["muted"], linewidth=1, linestyle="--")
        axes.text(0, level[0], level[1], color=_INKS["muted"], va="bottom", fontsize=8)
    axes.set_yscale("log")
    _plain(axes.yaxis, every_decade=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return _svg(figure)


def points(named: Sequence[tuple[str, float, float]], xlabel: str, ylabel: str) -> str:
    """Named points (name, x, y), y on a logarithmic scale where it spans decades."""
    figure, axes = _figure(3.0)
    ys = [y for _, _, y in named if y > 0 and isfinite(y)]
    for number, (name, x, y) in enumerate(named, 1):
        axes.plot([x], [y], "o", color=_INKS["accent"], markersize=5)
        axes.annotate(str(number), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        assert name
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
