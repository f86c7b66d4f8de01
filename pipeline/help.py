"""The text of `--help`, made from what is there: recipes, root keys, stages and their settings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path

from pipeline import compose, recipe_source
from pipeline.settings import key_of
from pipeline.stage import CHOICES, SLOTS, STAGES

_HEAD = """\
python -m pipeline KEY=VALUE ...

Turns a LoRA into a model and a model into a LoRA, by streaming over the files, and proves the result.

  python -m pipeline recipe=llama31                            a bundled recipe
  python -m pipeline recipe=./mine.yaml                        a file of mine
  python -m pipeline base_model=B adapter=A output=OUT         no recipe: merge
  python -m pipeline recipe=llama31 dry_run=true               the plan, nothing written
  python -m pipeline -m recipe=llama31 save.dtype=bfloat16,float16      one run for each value
"""


def text() -> str:
    """All of it."""
    parts = [_HEAD, "recipes", *(_line(name, _about(path)) for name, path in recipe_source.names().items())]
    docs = field_docs(compose.Root)
    parts += ["", "keys", *(_line(key, docs.get(key, "")) for key in ("recipe", *compose.ROOT_KEYS))]
    for slot, stages in STAGES.items():
        parts += ["", f"{slot}="]
        if slot in CHOICES:
            parts.append(_line("auto", _first(CHOICES[slot].__doc__)))
        shared = {*compose.ROOT_KEYS, *(f.name for f in fields(SLOTS[slot]))}
        for name, cls in stages.items():
            parts.append(_line(name, _first(cls.__doc__)))
            docs = field_docs(cls)
            for setting in compose.own_fields(cls):
                if setting.name not in shared:
                    parts.append(_line(f"  {slot}.{key_of(setting)}", docs[setting.name]))
    return "\n".join(parts) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, with those it inherits."""
    docs = {"recipe": "name of a recipe, or ./path of one"} if cls is compose.Root else {}
    for base in cls.__bases__:
        if is_dataclass(base):
            docs |= field_docs(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for one, after in zip(body.body, body.body[1:], strict=False):
        match one, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=doc)):
                docs[name] = str(doc)
    return docs


def _about(path: Path) -> str:
    """The first sentence of the comment that it begins with."""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=[.;:])\s", comment, maxsplit=1)[0].rstrip(";:")


def _first(doc: str | None) -> str:
    return next(iter((doc or "").strip().splitlines()), "")


def _line(name: str, about: str) -> str:
    return f"  {name:26} {about}".rstrip()
