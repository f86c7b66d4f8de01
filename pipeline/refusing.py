"""What Hydra, OmegaConf and the system raise about a request, as errors of our own: in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose, recipe_source, stage
from pipeline.ground.errors import PipelineError, Refused
from pipeline.sentences import sentence


def understood(error: Exception, given: Callable[[str], str]) -> PipelineError | None:
    """The error as one of ours, Refused where the request is wrong; None for a fault of ours.

    `given` is the text that the request has for a key, "" for none.
    """
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, HydraException | OmegaConfBaseException):
        return Refused(_composition_sentence(error))
    if isinstance(error, RecursionError):
        return Refused(f"recipe: '{given('recipe')}' builds on itself, or is nested too deeply")
    if isinstance(error, ValueError) and "Config group override must be a string" in str(error):
        key = next((key for key in (*stage.SLOTS, "recipe") if given(key) == "null"), "recipe")
        return no_choice(key, "null")
    if isinstance(error, OSError) and error.errno is not None:
        return PipelineError(f"{error.filename or 'writing'}: {error.strerror}; the run ended there")
    return None


def check_grammar(arguments: Iterable[str]) -> None:
    """Refused, all of it at once, for what Hydra cannot read, which names neither the key nor the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser, wrong = OverridesParser.create(), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            continue
        try:
            parser.parse_override(argument)
        except HydraException:
            wrong.append(
                f"{key}: {value} cannot be read; close what is open, and put text into quotes that the shell "
                f"leaves, as {key}='\"...\"' or, in a list, {key}='[\"...\"]'"
            )
    if wrong:
        raise Refused(*wrong)


def no_choice(key: str, value: str) -> Refused:
    """For a recipe, or a stage of a slot, that cannot be a name."""
    choices: Iterable[str] = recipe_source.names() if key == "recipe" else compose.offered(key)
    return Refused(f"{key}: {value} is no choice; choose {', '.join(sorted(choices))}")


def _composition_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's errors about a request, as one sentence."""
    if isinstance(error, recipe_source.RecipeError):
        return str(error)
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    offered = {slot: compose.offered(slot) for slot in stage.SLOTS}
    inner = [f"{s}.{f.name}" for s, nodes in offered.items() for node in nodes.values() for f in fields(node)]
    keys = [*compose.ROOT_KEYS, *stage.SLOTS, "recipe", *inner]
    return sentence(text, recipe_source.names(), offered, keys)
