"""The pipeline as functions, for notebooks and programs: composed as the command line is, told by exceptions.

A request is a table of what the command line takes: `{"recipe": "llama31", "save": {"dtype": "float16"}}`.
Nothing of the process changes: not the current folder, not the logging, not a Hydra that is in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from pipeline.ground.errors import Refused

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pipeline.ground.report import Plan, Report

Asked = str | Path | Mapping[str, Any] | None
_TURNS = RLock()  # Hydra's stores and torch's number of threads belong to the process


def run(asked: Asked = None, /, *, quiet: bool = False, **keys: Any) -> Report:
    """Does what `python -m pipeline` does: `run("llama31", base_model=..., save={"dtype": "float16"})`.

    `asked` is a recipe's name or file, or a table of keys; `keys` win over it. A slot takes the name of a
    stage or a table of settings: `{"merge": "ties", "merge.density": 0.5}`. `quiet` prints nothing.

    What comes of it is published, or put aside, as by the command line. A report that says no is returned
    like any other, for it is what one wants to look at: ask `report.passed`, or call `report.require()`.
    Raises Refused where the request is wrong and nothing was written, PipelineError where the run failed.
    Runs of several threads take turns.
    """
    from pipeline import compose
    from pipeline.arguments import expanded
    from pipeline.door import Request, fulfil
    from pipeline.ground.report import Rejected

    with _composed(asked, keys, quiet) as cfg:
        if cfg.sweep.over is not None:
            raise Refused("sweep.over: a sweep is the command line's; python -m pipeline runs it")
        pipeline = compose.build(cfg)
        if cfg.dry_run or not pipeline.save.needs_output:
            raise Refused(f"{'dry_run' if cfg.dry_run else 'save'}: asks for a plan; call pipeline.plan")
        path = expanded("report", cfg.report) if cfg.report else None
        try:
            report = fulfil(Request(pipeline, compose.settings(cfg), path))
        except Rejected as rejected:
            return rejected.report
        assert report is not None
        return report


def plan(asked: Asked = None, /, **keys: Any) -> Plan:
    """What `run` would do, as `dry_run=true` tells it, and nothing is written; Refused if it would not."""
    from pipeline import compose

    with _composed(asked, {**keys, "dry_run": True}, quiet=True) as cfg:
        return compose.build(cfg).plan()


@contextmanager
def _composed(asked: Asked, keys: Mapping[str, Any], quiet: bool) -> Iterator[DictConfig]:
    """The request as Hydra composes it; what goes wrong while it is used is raised as an error of ours."""
    from pipeline.ground.progress import quietly
    from pipeline.refusing import understood

    table = asked if isinstance(asked, Mapping) else {} if asked is None else {"recipe": asked}
    choices, settings = _sorted_out(table, keys)
    with _TURNS, quietly(quiet):
        try:
            yield _compose(choices, settings)
        except Exception as error:
            known = understood(error, lambda key: str(choices.get(key, "")))
            if known is None or known is error:
                raise
            raise known from (None if isinstance(known, Refused) else error)  # the sentences say it all


def _sorted_out(*tables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is chosen by name: recipe and stages, all other keys), later tables winning over earlier ones."""
    from pipeline.stage import SLOTS

    choices: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for given, value in (item for table in tables for item in table.items()):
        key, dot, setting = str(given).partition(".")
        value = _plain({setting: value} if dot else value)
        if isinstance(value, dict) and isinstance(known := settings.get(key), dict):
            known.update(value)
        elif key == "recipe" or (key in SLOTS and not isinstance(value, dict)):
            choices[key] = value
        else:
            settings[key] = value
    return choices, settings


def _plain(value: Any) -> Any:
    """A value as YAML would hold it."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _compose(choices: Mapping[str, Any], settings: Mapping[str, Any]) -> DictConfig:
    """Hydra's composition of conf/, the recipe, and this request over them; nothing of it stays behind."""
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl  # hydra.compose wants a global Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_store import ConfigStore
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    from pipeline import compose, recipe_source, stage
    from pipeline.arguments import quoted, recipe_path
    from pipeline.ground.paths import bundled
    from pipeline.refusing import no_choice

    if "defaults" in settings:
        raise Refused("defaults: no such key; give a recipe as recipe=..., and stages as merge='ties'")
    stage.load_stages()
    compose.register()
    recipe_source.register()
    recipe_source.screen(settings, "the request")
    chosen = []
    for key, name in choices.items():
        if not isinstance(name, str):
            raise no_choice(key, "null" if name is None else str(name))
        chosen.append(f"{key}={quoted(recipe_path(name) if key == 'recipe' else name)}")
    store, hydra_version = ConfigStore.instance(), version.VersionBase.instance()
    before = hydra_version.version_base
    try:
        store.store(group="asked", name="asked", package="_global_", node=OmegaConf.create(dict(settings)))
        version.setbase("1.3")
        loader = ConfigLoaderImpl(create_config_search_path(str(bundled("conf"))))
        overrides = [*chosen, "+asked=asked"]
        cfg = loader.load_configuration("config", overrides, RunMode.RUN, from_shell=False)
    finally:
        store.repo.pop("asked", None)
        hydra_version.version_base = before
    with open_dict(cfg):
        cfg.pop("hydra")
    return cfg
