"""The merged model's answers against those of base + unmerged adapter, through transformers and PEFT.

Both sides run in float32, one after the other: one model at a time is in memory. KL divergences are in nats
per token: KL(adapter || merged) is what the merge changed, KL(adapter || base) what the adapter does; their
ratio says how much of its effect is off.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground import reuse
from pipeline.ground.divergence import Positions, divergence, figures, positions
from pipeline.ground.errors import PipelineError
from pipeline.ground.generating import answers_to
from pipeline.ground.identity import of_outputs
from pipeline.ground.libraries import quiet
from pipeline.ground.progress import working

if TYPE_CHECKING:
    from torch import Tensor

CHARACTERS = 16  # of a text that no tokenizer makes one token of, on average
SEQUENCE = 128  # tokens in one forward pass
_TOGETHER = 4  # sequences in one pass, where the noise of the evaluation is measured
_PREDICT_NEXT = ("CausalLM", "LMHead", "ConditionalGeneration")  # in the names of such classes


class CannotCompare(PipelineError):  # noqa: N818  it reads like what happened
    """Base and adapter themselves do not load or run here: nothing is said about the merge."""


class MergedDoesNotRun(PipelineError):  # noqa: N818
    """The merged model does not load or run, where base and adapter do."""


@dataclass(frozen=True)
class Models:
    """What is compared: folders of adapter and merged model, and how to get the base in float32."""

    merged: Path
    adapters: Sequence[tuple[Path, float]]  # with the factors that they were merged with
    base: Callable[[type], Any]  # the model class to a model
    load_merged: Callable[[type], Any] | None = None  # where its loader is not to be asked
    reference: Callable[[], str | None] = lambda: None  # what base and adapters are, as a digest


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
    models: Models, text: str, num_tokens: int, prompts: Sequence[str], device: str, first: int = 0
) -> Outcome:
    """Runs base, base + adapter and merged model on the same tokens of the text, from number `first` on."""
    import torch

    with quiet(), torch.inference_mode():
        config, tokenizer, cls = prepare(models.merged)
        assumed: list[str] = []
        tokens = tokens_of(tokenizer, text, config, num_tokens, assumed, first)
        try:
            with working("comparing logits: base and adapter"):
                key = partial(of_outputs, models.reference, tokens, cls, device, prompts, models.merged)
                make = partial(_reference, models, cls, tokens, tokenizer, prompts, device)
                (with_adapter, without), (by_adapter, by_base, floor) = reuse.result(key, make)
        except Exception as error:  # whatever transformers or PEFT raise about base and adapter
            raise CannotCompare(reason(error)) from error
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        try:
            with working("comparing logits: merged model"):
                merged = _merged(models, cls).eval().to(device)
                with_merged, by_merged = outputs(merged, tokens), answers_to(merged, tokenizer, prompts)
        except (MemoryError, torch.OutOfMemoryError) as error:  # says nothing about the merge
            raise CannotCompare(reason(error)) from error
        except Exception as error:
            raise MergedDoesNotRun(reason(error)) from error
        next_tokens = following(tokens, cls, len(with_merged))
        seen = positions(with_adapter, without, with_merged, next_tokens)
    said = [
        {"prompt": prompt, "base": one, "adapter": other, "merged": last}
        for prompt, one, other, last in zip(prompts, by_base, by_adapter, by_merged, strict=False)
    ]
    found = {**figures(seen), "kl_floor": floor, "tokens": tokens.numel()}
    return Outcome(found, said or None, assumed, seen)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of several stretches of text: figures over all positions, the first's answers."""
    if len(outcomes) == 1:
        return outcomes[0]
    found = figures(Positions.together([o.positions for o in outcomes if o.positions]))
    weights = [o.figures["tokens"] for o in outcomes]
    floor = sum(o.figures["kl_floor"] * n for o, n in zip(outcomes, weights, strict=True)) / sum(weights)
    told = list(dict.fromkeys(line for o in outcomes for line in o.assumed))
    rest = {**outcomes[0].figures, **found, "kl_floor": floor, "tokens": sum(weights)}
    return Outcome(rest, outcomes[0].answers, told)


def _reference(
    models: Models, cls: Any, tokens: Tensor, tokenizer: Any, prompts: Sequence[str], device: str
) -> reuse.Result:
    """Outputs and answers with the adapter and without, and the noise: the merged model has no part in it."""
    model = adapted(models, cls, device)
    with_adapter, by_adapter = outputs(model, tokens), answers_to(model, tokenizer, prompts)
    floor = noise(model, tokens, with_adapter)
    with model.disable_adapter():
        without, by_base = outputs(model, tokens), answers_to(model, tokenizer, prompts)
    return reuse.Result((with_adapter, without), (by_adapter, by_base, floor))


def _merged(models: Models, cls: Any) -> Any:
    import torch

    if models.load_merged:
        return models.load_merged(cls)
    return cls.from_pretrained(models.merged, dtype=torch.float32, trust_remote_code=False)


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


def adapted(models: Models, cls: type, device: str) -> Any:
    from peft import PeftModel

    model = None
    for number, (folder, factor) in enumerate(models.adapters):
        name = f"adapter{number}"
        if model is None:
            model = PeftModel.from_pretrained(models.base(cls), str(folder), adapter_name=name)
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
    if len(models.adapters) > 1:
        model.base_model.set_adapter([f"adapter{number}" for number in range(len(models.adapters))])
    return model.eval().to(device)


def outputs(model: Any, tokens: Tensor) -> Tensor:
    """`(positions, classes)` log-probabilities; of a model without a head, its hidden states; on the CPU."""
    import torch

    return torch.cat([predictions(model, sequence[None]) for sequence in tokens])


def predictions(model: Any, ids: Tensor) -> Tensor:
    """The same of one pass, through `(sequences, length)` token ids."""
    out = model(input_ids=ids.to(model.device))
    logits = getattr(out, "logits", None)
    values = out.last_hidden_state if logits is None else logits.float().log_softmax(-1)
    flat: Tensor = values.float().cpu().flatten(0, -2)
    return flat


def following(tokens: Tensor, cls: type, num_rows: int) -> Tensor | None:
    """The token that follows at each position, -1 at the end of a sequence; None where none is predicted."""
    import torch

    if not any(part in cls.__name__ for part in _PREDICT_NEXT) or num_rows != tokens.numel():
        return None
    return torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], 1).flatten()


def noise(model: Any, tokens: Tensor, alone: Tensor) -> float:
    """Mean divergence, in nats, of the same model's predictions when sequences are run together."""
    return apart(alone, predictions(model, side_by_side(tokens)))


def side_by_side(tokens: Tensor) -> Tensor:
    """Sequences for a pass of another shape."""
    return tokens[:_TOGETHER] if len(tokens) > 1 else tokens.repeat(2, 1)


def apart(alone: Tensor, values: Tensor) -> float:
    """Mean divergence, in nats, of what such a pass predicts."""
    values = values[: len(alone)]
    return float(divergence(alone[: len(values)], values).mean())


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"KL(adapter||merged) {figures['kl_mean']:.2g}, "
        f"of KL(adapter||base) {figures['kl_adapter_base']:.2g}: ratio {figures['ratio']:.2g}, "
        f"top-1 agreement {figures['top1_agreement']:.2%}"
    )
