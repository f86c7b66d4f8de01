"""Recipes: folders of plain YAML, mounted at the Hydra group `recipe`.

A recipe may come from a stranger, so it is read as data: it chooses registered stages by name and gives
them values. It cannot name a Python object, reach Hydra's own settings or read the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, YAMLError

from pipeline.ground.paths import bundled
from pipeline.stage import SLOTS

GROUP = "recipe"
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_AXIS = re.compile(r"[a-z][a-z_]*(\.[a-z][a-z_0-9]*)*")
_NO_AXES = ("hydra", "recipe", "output", "report", "sweep", "debug", "dry_run")
_SCALARS = (str, int, float, bool, type(None))
_MAX_BYTES = 256 * 1024  # a recipe is a page; more is a YAML bomb or the wrong file


class RecipeError(ConfigCompositionException):
    """The recipe asks for more than a recipe may."""


class RecipeSource(ConfigSource):
    """`recipe://FOLDER`: FOLDER/llama31.yaml is `recipe=llama31`, laid over the root config."""

    @staticmethod
    def scheme() -> str:
        return GROUP

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP) or bool((p := self._path(config_path)) and p.is_dir())

    def is_config(self, config_path: str) -> bool:
        return bool((p := self._path(self._normalize_file_name(config_path))) and p.is_file())

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = self._path(config_path)
        names = [GROUP] if config_path == "" else [p.name for p in folder.iterdir()] if folder else []
        found: list[str] = []
        for name in sorted(names):
            self._list_add_result(found, f"{config_path}/{name}".lstrip("/"), name, results_filter)
        return found

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._path(self._normalize_file_name(config_path))
        assert path is not None
        config = _read(path)
        return ConfigResult(self.provider, f"recipe://{self.path}", config, header={"package": "_global_"})

    def _path(self, config_path: str) -> Path | None:
        """The file or folder behind `recipe/NAME`; None for a name that is not ours to answer."""
        group, _, name = config_path.partition("/")
        if group == GROUP and name.startswith(("./", "../", "/", "~/")):
            return Path(os.path.expanduser(name)).absolute()  # noqa: PTH111  from the command line only
        if group != GROUP or (name and not _NAME.fullmatch(name)):
            return None
        return Path(self.path) / name


def _read(path: Path) -> DictConfig:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: is larger than a recipe may be ({_MAX_BYTES} bytes)")
        text = path.read_text("utf-8")
        if any(isinstance(event, AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise RecipeError(f"{path}: repeats a part by a YAML alias (*name); write it out")
        config = OmegaConf.create(text)
        table = OmegaConf.to_container(config, resolve=False)
        screen(table, str(path))
        _screen_references(table, str(path))
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: is not a recipe in YAML ({reason})") from error
    if not isinstance(config, DictConfig):
        raise RecipeError(f"{path}: is a list; a recipe is a table of keys")
    return config


class RecipeFolders(SearchPathPlugin):
    """Looks in the folders of PIPELINE_RECIPES first, then in the recipes that came with us."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in folders():
            search_path.append(provider="recipes", path=f"recipe://{folder}")


def folders() -> list[Path]:
    """The folders in which a recipe's name is looked up, in order."""
    own = os.environ.get("PIPELINE_RECIPES", "").split(os.pathsep)
    own_folders = [Path(os.path.expanduser(p)).absolute() for p in own if p]  # noqa: PTH111  ~nobody: none
    return [*own_folders, bundled("recipes")]


def names() -> dict[str, Path]:
    """All recipes by name, the first folder that has one winning."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def axes(recipe: str) -> dict[str, list[Any]]:
    """What `sweep.over` of a recipe's own file asks for: keys and the values each takes; {} for most."""
    path, told = _sweep(recipe)
    over = told.get("over")
    if over is None:
        return {}
    if not isinstance(over, dict):
        raise RecipeError(
            f"{path}: sweep.over: {over!r} is not a table; write {{save.dtype: [bfloat16, float16]}}"
        )
    for key, values in over.items():
        plain = isinstance(values, list) and values and all(isinstance(v, _SCALARS) for v in values)
        if not plain:
            raise RecipeError(f"{path}: sweep.over: {key}: {values!r} is not a list of values")
        if not _AXIS.fullmatch(str(key)) or str(key).partition(".")[0] in _NO_AXES:
            raise RecipeError(f"{path}: sweep.over: '{key}' is no key that runs of a sweep may differ in")
    return {str(key): list(values) for key, values in over.items()}


def under(recipe: str) -> float | None:
    """`sweep.under` of a recipe's own file."""
    value = _sweep(recipe)[1].get("under")
    return None if value is None else float(value)


def _sweep(recipe: str) -> tuple[Path, dict[str, Any]]:
    """A recipe's own file, and what it says of sweeping."""
    path = names().get(recipe) or Path(os.path.expanduser(recipe))  # noqa: PTH111  ~nobody is no error
    table = OmegaConf.to_container(_read(path), resolve=False) if path.is_file() else None
    told = table.get("sweep") if isinstance(table, dict) else None
    return path, told if isinstance(told, dict) else {}


def register() -> None:
    """Makes Hydra look for recipes."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeFolders)


def screen(node: Any, where: str, key: str = "") -> None:
    """Raises RecipeError at the first entry that is more than data."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = f"{key}.{name}".lstrip(".")
            if inner == "hydra" or inner.startswith("hydra.") or str(name).startswith("_"):
                raise RecipeError(
                    f"{where}: '{inner}' is not a recipe's to set; "
                    "a stage is chosen by name, with '- override /merge: exact' under defaults"
                )
            if inner == "defaults":
                if not isinstance(value, list):
                    raise RecipeError(f"{where}: defaults: {value!r} is not a list; write [{value}]")
                for entry in value:
                    _screen_default(entry, where)
            elif inner in SLOTS and not isinstance(value, dict):
                name = value if isinstance(value, str) and _NAME.fullmatch(value) else "NAME"
                raise RecipeError(
                    f"{where}: {inner}: {value!r} is not a table of settings; a stage is chosen by name, "
                    f"with '- override /{inner}: {name}' under defaults"
                )
            else:
                screen(value, where, inner)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            screen(value, where, f"{key}[{i}]")
    elif isinstance(node, str) and "${" in re.sub(r"\$\{[\w.]+\}", "", node):
        raise RecipeError(
            f"{where}: '{key}: {node}' calls a resolver; write the value, or pass it on the command line"
        )


def _screen_references(table: Any, where: str) -> None:
    """Raises RecipeError where a reference leads to another one: a page of those grows to gigabytes."""
    values: dict[str, str] = dict(_texts(table, ""))
    referring = {key for key, value in values.items() if "${" in value}
    for key in referring:
        for target in re.findall(r"\$\{([\w.]+)\}", values[key]):
            if any(other == target or other.startswith(f"{target}.") for other in referring):
                raise RecipeError(
                    f"{where}: '{key}: {values[key]}' refers to {target}, which refers further; write it out"
                )


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{key}.{name}".lstrip("."))


def _screen_default(entry: Any, where: str) -> None:
    allowed = False
    if isinstance(entry, str):
        allowed = entry == "_self_" or _NAME.fullmatch(entry) is not None
    elif isinstance(entry, dict) and len(entry) == 1:
        [(slot, name)] = entry.items()
        fits = re.fullmatch(r"override /(?!hydra\b|recipe\b)[a-z]+", str(slot)) is not None
        allowed = fits and isinstance(name, str) and _NAME.fullmatch(name) is not None
    if not allowed:
        raise RecipeError(
            f"{where}: defaults entry {entry!r} is neither another recipe's name nor '- override /slot: name'"
        )
