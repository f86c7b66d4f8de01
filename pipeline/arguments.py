"""The command line before Hydra sees it: paths in quotes, slips told in a sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.ground.errors import Refused

_PATH_KEYS = (
    "base_model",
    "adapter",
    "finetune",
    "output",
    "report",
    "recipe",
    "verify.text",
    "extract.initial",
    "extract.calibration",
)
_TEXT_KEYS = ("verify.prompts",)
_MODULE_KEYS = ("targeted_modules", "saved_modules")
OWN_REPORTS = "report: every run of a sweep writes its own report.json; leave report= out"
_FLAGS = re.compile(  # Hydra's own
    r"-m|--multirun|-c|--cfg|-p|--package|--resolve|--run|-r|--info|-i|--hydra-help|--shell-completion|-sc|"
    r"--config-path|-cp|--config-name|-cn|--config-dir|-cd|--experimental-rerun"
)


def is_sweep(arguments: list[str]) -> bool:
    """Whether one run for each combination of values is asked for."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))


def prepared(arguments: list[str]) -> list[str]:
    """The arguments as Hydra may read them; Refused, all of it at once, for what is no argument."""
    sweeps, value_follows = is_sweep(arguments), False
    ready: list[str] = []
    wrong: list[str] = []
    for argument in arguments:
        try:
            ready.append(argument if value_follows else _prepared(argument, sweeps))
        except Refused as refusal:
            wrong += refusal.sentences
        value_follows = argument in {"-c", "--cfg", "-p", "--package", "-cp", "-cn", "-cd"} or (
            argument.startswith("--config") and "=" not in argument
        )
    if sweeps and any(argument.startswith("report=") for argument in arguments):
        wrong.append(OWN_REPORTS)
    if not sweeps:
        launching = [
            a.partition("=")[0] for a in arguments if a.startswith(("hydra/launcher=", "hydra/sweeper="))
        ]
        wrong += [f"{key}: launches the runs of a sweep; add -m and several values" for key in launching]
    if wrong:
        raise Refused(*wrong)
    return ready


def _prepared(argument: str, sweeps: bool) -> str:
    if argument.startswith("-"):
        if not _FLAGS.fullmatch(argument.partition("=")[0]):
            raise Refused(f"'{argument}' is not an option; settings are KEY=VALUE, as dry_run=true")
        return argument
    key, equals, value = argument.partition("=")
    if argument.startswith("~") and not equals:
        return argument  # Hydra's way to delete a key, which it refuses by name
    if not equals or not key:
        raise Refused(f"'{argument}' is not KEY=VALUE")
    if not _is_text(key, value) or value[:1] in "'\"[{" or value.startswith("${") or value == "null":
        return argument
    if key in ("output", "report"):
        expanded(key, value)
    if sweeps and "," in value and not os.path.lexists(os.path.expanduser(value)):  # noqa: PTH111
        return argument  # several values
    return f"{key}={quoted(recipe_path(value) if key == 'recipe' else value)}"


def _is_text(key: str, value: str) -> bool:
    """Whether a value is a path, words or a regular expression: nothing that has a grammar of Hydra's."""
    return bool(value) and (
        key in (*_PATH_KEYS, *_TEXT_KEYS) or (key in _MODULE_KEYS and value.startswith("re:"))
    )


def expanded(key: str, value: str) -> Path:
    """A path that is to be written to, its ~ replaced; Refused where that is nobody's."""
    found = os.path.expanduser(value)  # noqa: PTH111  ./~x is no home
    if found.startswith("~"):
        raise Refused(f"{key}: '{value}' names no user's home; write ./{value} for a path called so")
    return Path(found)


def recipe_path(value: str) -> str:
    """A recipe's file as an absolute path, so that it means the file from here; a name stays a name."""
    looks_like_path = value.startswith((".", "/", "~")) or ".." in value.split("/")
    path = Path(os.path.abspath(os.path.expanduser(value)))  # noqa: PTH100, PTH111  ~nobody is no error
    named = path if path.suffix in (".yaml", ".yml") else path.with_name(path.name + ".yaml")
    if not looks_like_path and not (value.endswith((".yaml", ".yml")) and named.is_file()):
        return value
    if not named.is_file():
        raise Refused(f"recipe: '{value}' does not exist; give a recipe's name or a YAML file")
    return str(named)


def quoted(value: str) -> str:
    """A value in quotes, so that no character of it is taken for Hydra's grammar."""
    if re.fullmatch(r"[\w./@:+-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
    return "'" + escaped + "\\" * (len(escaped) - len(escaped.rstrip("\\"))) + "'"
