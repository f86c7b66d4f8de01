"""The few pieces of HTML our pages are made of. Whatever text goes in is escaped here, once."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

# Nothing of a page is fetched and nothing in it runs, whatever stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """A string that is HTML already; any other is text and gets escaped."""

    __slots__ = ()


class Column(NamedTuple):
    """A column of a table: its head, and whether it holds numbers."""

    head: str
    number: bool = False


def text(value: object) -> Markup:
    """A value as HTML text; control characters, which no HTML may hold, are shown as their escapes."""
    if isinstance(value, Markup):
        return value
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(value)
    )
    return Markup(escape(shown))


def element(tag: str, *parts: object, **attributes: str) -> Markup:
    """`<tag attributes>parts</tag>`; `class_` stands for class."""
    named = "".join(f' {name.strip("_")}="{text(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{named}>{''.join(map(text, parts))}</{tag}>")


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], kind: str = "") -> Markup:
    """A table; on a narrow screen a `wide` one scrolls in its place, the rows of a `stack` become blocks."""
    kinds = [{"class_": "n"} if column.number else {} for column in columns]
    head = [element("th", c.head, **kind) for c, kind in zip(columns, kinds, strict=True)]
    body = [
        element("tr", *(element("td", cell, **kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", whole, class_=kind) if kind else whole


def figure(caption: str, svg: str | None) -> Markup:
    """A chart under its caption; a sentence where it could not be drawn."""
    if svg is None:
        return element("p", f"{caption}: this chart could not be drawn.", class_="muted")
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    return element("figure", element("figcaption", caption), Markup(named))


def section(title: str, *parts: object) -> Markup:
    """A part of a page under its heading."""
    return element("section", element("h2", title), *parts)


def page(title: str, *parts: Markup) -> str:
    """A whole page, which needs no other file."""
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
