"""What models predict on a text, through transformers and PEFT: one against what it should be.

All run in float32, one after the other: one model at a time is in memory, or one layer of it. KL divergences
are in nats per token: KL(wanted || judged) is how far off the model is, KL(wanted || base) how far it was to
go; their ratio says how much of that is missed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.ground.divergence import Positions, figures, positions
from pipeline.ground.errors import PipelineError
from pipeline.ground.libraries import quiet
from pipeline.ground.predicting import Form, Load

if TYPE_CHECKING:
    from torch import Tensor

CHARACTERS = 16  # of a text that no tokenizer makes one token of, on average
SEQUENCE = 128  # tokens in one forward pass
_NO_ANSWERS = (
    "base, adapter and merged model answered no prompt: layer by layer, each token would read them anew"
)
Adapters = Sequence[tuple[Path, float]]  # their folders, with the factors that they were merged with
_PREDICT_NEXT = ("CausalLM", "LMHead", "ConditionalGeneration")  # in the names of such classes


class CannotCompare(PipelineError):  # noqa: N818  it reads like what happened
    """Base and adapter themselves do not load or run here: nothing is said about the merge."""


class MergedDoesNotRun(PipelineError):  # noqa: N818
    """The merged model does not load or run, where base and adapter do."""


@dataclass(frozen=True)
class Asked:
    """What all models that are compared are asked, and in which form they are run."""

    cls: Any  # the model class
    tokens: Tensor
    tokenizer: Any
    prompts: Sequence[str]
    form: Form


class Predicted(NamedTuple):
    """`(positions, classes)` log-probabilities of what is wanted, of the base and of what is judged."""

    wanted: Tensor
    base: Tensor
    judged: Tensor
    figures: Mapping[str, Any] = MappingProxyType({})  # more of them
    answers: list[dict[str, str]] | None = None


class Models(Protocol):
    """The models that are compared: what is judged, what it should be, and the base that it was made of."""

    @property
    def told(self) -> Path:
        """The folder with the config.json and tokenizer that all of them share."""

    def predicted(self, asked: Asked) -> Predicted:
        """Runs them; CannotCompare, MergedDoesNotRun or DoesNotFit where that is not possible."""


@dataclass(frozen=True)
class Outcome:
    """Figures for the report, the answers to the prompt, and what had to be assumed."""

    figures: dict[str, Any]
    answers: list[dict[str, str]] | None
    assumed: list[str]
    positions: Positions | None = None  # for figures over several stretches of text


class TextEnds(Exception):  # noqa: N818
    """The text has no more tokens."""


def compare(
    models: Models, text: str, num_tokens: int, prompts: Sequence[str], form: Form, first: int = 0
) -> Outcome:
    """Runs all models on the same tokens of the text, from number `first` on."""
    import torch

    with quiet(), torch.inference_mode():
        config, tokenizer, cls = prepare(models.told)
        assumed = [_NO_ANSWERS] if prompts and not form.speaks else []
        tokens = tokens_of(tokenizer, text, config, num_tokens, assumed, first)
        asked = Asked(cls, tokens, tokenizer, prompts if form.speaks else (), form)
        found = models.predicted(asked)
        next_tokens = following(tokens, cls, len(found.wanted))
        if next_tokens is not None:  # a fine-tune may know more tokens than are compared
            next_tokens = next_tokens.where(next_tokens < found.wanted.shape[-1], -1)
        seen = positions(found.wanted, found.base, found.judged, next_tokens)
    told = {**figures(seen), **found.figures, "tokens": tokens.numel(), **form.told()}
    return Outcome(told, found.answers, assumed, seen)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of several stretches of text: figures over all positions, the first's answers."""
    if len(outcomes) == 1:
        return outcomes[0]
    found = figures(Positions.together([o.positions for o in outcomes if o.positions]))
    weights = [o.figures["tokens"] for o in outcomes]
    told = list(dict.fromkeys(line for o in outcomes for line in o.assumed))
    rest = {**outcomes[-1].figures, **found, "tokens": sum(weights)}
    if "kl_floor" in rest:
        floors = [o.figures["kl_floor"] * n for o, n in zip(outcomes, weights, strict=True)]
        rest["kl_floor"] = sum(floors) / sum(weights)
    return Outcome(rest, outcomes[0].answers, told)


def reason(error: Exception) -> str:
    """An error of a library in a few words."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def memory_needed(num_parameters: int, vocabulary: int, num_tokens: int) -> int:
    """Bytes: one model in float32 with a fifth on top, and three sets of logits with room to compare."""
    return int(num_parameters * 4 * 1.2) + 6 * num_tokens * max(vocabulary, 1) * 4


def prepare(folder: Path) -> tuple[Any, Any, Any]:
    import transformers

    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise CannotCompare(f"transformers does not know model_type {kind!r}, and custom code is never run")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config that transformers takes for broken
        raise MergedDoesNotRun(reason(error)) from error
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise CannotCompare(f"transformers has no class {config.architectures}, and custom code is never run")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # no tokenizer, or one that needs a library that is not here
        tokenizer = None
    return config, tokenizer, cls


def tokens_of(
    tokenizer: Any, text: str, config: Any, count: int, assumed: list[str], first: int = 0
) -> Tensor:
    """`(sequences, SEQUENCE)` token ids of the text from `first` on; random ones without a tokenizer."""
    import torch

    size = getattr(config.get_text_config(), "vocab_size", 2)
    if tokenizer is not None:
        whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = whole[first : first + count]
        speaks = len(whole) >= min(count, len(text) // CHARACTERS)  # transformers makes one of nothing
        if len(whole) and speaks and int(whole.max()) < size:
            if first and not len(ids):
                raise TextEnds
            if len(ids) < count:
                assumed.append(f"logits were compared on {len(whole)} tokens, all that the text has")
            length = min(longest(config), len(ids))
            return ids[: len(ids) // length * length].view(-1, length)
    assumed.append("logits were compared on random tokens, because the model has no tokenizer that loads")
    random = torch.Generator().manual_seed(first)
    length = min(longest(config), count)
    return torch.randint(size, (max(count // length, 1), length), generator=random)


def longest(config: Any, wanted: int = SEQUENCE) -> int:
    """Tokens of a sequence: as many as wanted, or fewer where the model has no more positions."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or wanted
    return min(wanted, max(int(most) - 2, 1))  # RoBERTa's positions begin at 2


def adapted(base: Load, adapters: Adapters, cls: type) -> Any:
    """Base + unmerged adapters, as PEFT puts them together."""
    from peft import PeftModel

    model = None
    for number, (folder, factor) in enumerate(adapters):
        name = f"adapter{number}"
        if model is None:
            model = PeftModel.from_pretrained(base(cls), str(folder), adapter_name=name)
        loaded = model.load_adapter(str(folder), name)  # the first once more, for what it could not place
        missing = [key for key in loaded.missing_keys if "vector_bank" not in key]  # VBLoRA's is shared
        copies = (".modules_to_save.", "lm_head.token_adapter.")  # PEFT saves and then does not expect them
        beyond = [key for key in loaded.unexpected_keys if not any(copy in key for copy in copies)]
        if lost := [*missing, *beyond]:
            raise CannotCompare(
                f"PEFT itself does not take {len(lost)} tensors of this adapter, as {lost[0]}"
            )
        for module in model.modules():
            scaling = getattr(module, "scaling", None)
            if factor != 1 and isinstance(scaling, dict) and name in scaling:
                scaling[name] *= factor
    assert model is not None
    if len(adapters) > 1:
        model.base_model.set_adapter([f"adapter{number}" for number in range(len(adapters))])
    return model


def following(tokens: Tensor, cls: type, num_rows: int) -> Tensor | None:
    """The token that follows at each position, -1 at the end of a sequence; None where none is predicted."""
    import torch

    if not any(part in cls.__name__ for part in _PREDICT_NEXT) or num_rows != tokens.numel():
        return None
    return torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], 1).flatten()
