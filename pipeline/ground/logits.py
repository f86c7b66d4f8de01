"""The merged model's answers against those of base + unmerged adapter, through transformers and PEFT.

Both sides run in float32, one after the other, so that one model at a time is in memory. KL divergences
are in nats per token: KL(adapter || merged) is what the merge changed, KL(adapter || base) what the
adapter does; their ratio says how much of its effect is off.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground.divergence import compared, divergence
from pipeline.ground.errors import PipelineError
from pipeline.ground.progress import working

if TYPE_CHECKING:
    from torch import Tensor

_CHARACTERS = 16  # of a text that no tokenizer makes one token of, on average
SEQUENCE = 128  # tokens in one forward pass
_TOGETHER = 4  # sequences in one pass, where the noise of the evaluation is measured
_PREDICT_NEXT = ("CausalLM", "LMHead", "ConditionalGeneration")  # in the names of such classes
_NEW_TOKENS = 48


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


@dataclass(frozen=True)
class Outcome:
    """Figures for the report, the answers to the prompt, and what had to be assumed."""

    figures: dict[str, Any]
    answers: dict[str, str] | None
    assumed: list[str]


def compare(models: Models, text: str, num_tokens: int, prompt: str | None, device: str) -> Outcome:
    """Runs base, base + adapter and merged model on the same tokens."""
    import torch

    with quiet(), torch.inference_mode():
        config, tokenizer, cls = prepare(models.merged)
        assumed: list[str] = []
        tokens = tokens_of(tokenizer, text, config, num_tokens, assumed)
        try:
            with working("comparing logits: base and adapter"):
                with_lora = adapted(models, cls, device)
                with_adapter, second = outputs(with_lora, tokens), _answer(with_lora, tokenizer, prompt)
                floor = noise(with_lora, tokens, with_adapter)
                with with_lora.disable_adapter():
                    without, first = outputs(with_lora, tokens), _answer(with_lora, tokenizer, prompt)
        except Exception as error:  # whatever transformers or PEFT raise about base and adapter
            raise CannotCompare(reason(error)) from error
        del with_lora
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        try:
            with working("comparing logits: merged model"):
                merged = _merged(models, cls).eval().to(device)
                with_merged, third = outputs(merged, tokens), _answer(merged, tokenizer, prompt)
        except (MemoryError, torch.OutOfMemoryError) as error:  # says nothing about the merge
            raise CannotCompare(reason(error)) from error
        except Exception as error:
            raise MergedDoesNotRun(reason(error)) from error
        next_tokens = following(tokens, cls, len(with_merged))
        figures = {**compared(with_adapter, without, with_merged, next_tokens), "kl_floor": floor}
    answers = {"base": first, "adapter": second, "merged": third}
    said = {"prompt": prompt, **answers} if prompt and None not in answers.values() else None
    return Outcome({**figures, "tokens": tokens.numel()}, said, assumed)  # type: ignore[arg-type]


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


def memory_free(device: str) -> int:
    """Bytes that this process can still take on the device; on the CPU, by machine and control group."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


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


def tokens_of(tokenizer: Any, text: str, config: Any, count: int, assumed: list[str]) -> Tensor:
    """`(sequences, SEQUENCE)` token ids of the text; random ones where there is no tokenizer."""
    import torch

    size = getattr(config.get_text_config(), "vocab_size", 2)
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:count])
        speaks = len(ids) >= min(count, len(text) // _CHARACTERS)  # transformers makes one of nothing
        if len(ids) and speaks and int(ids.max()) < size:
            if len(ids) < count:
                assumed.append(f"logits were compared on {len(ids)} tokens, all that the text has")
            length = min(_longest(config), len(ids))
            return ids[: len(ids) // length * length].view(-1, length)
    assumed.append("logits were compared on random tokens, because the model has no tokenizer that loads")
    random = torch.Generator().manual_seed(0)
    length = min(_longest(config), count)
    return torch.randint(size, (max(count // length, 1), length), generator=random)


def _longest(config: Any) -> int:
    """Tokens of a sequence: SEQUENCE, or fewer where the model has no more positions."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or SEQUENCE
    return min(SEQUENCE, max(int(most) - 2, 1))  # RoBERTa's positions begin at 2


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
    return apart(alone, predictions(model, together(tokens)))


def together(tokens: Tensor) -> Tensor:
    """Sequences for a pass of another shape."""
    return tokens[:_TOGETHER] if len(tokens) > 1 else tokens.repeat(2, 1)


def apart(alone: Tensor, values: Tensor) -> float:
    """Mean divergence, in nats, of what such a pass predicts."""
    values = values[: len(alone)]
    return float(divergence(alone[: len(values)], values).mean())


def _answer(model: Any, tokenizer: Any, prompt: str | None) -> str | None:
    """What the model says to the prompt, greedily; None where it cannot generate."""
    if not prompt or tokenizer is None or not hasattr(model, "generate"):
        return None
    import torch

    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    ids = ids.to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out: Tensor = model.generate(
        **ids,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    said: str = tokenizer.decode(
        torch.as_tensor(out[0][ids["input_ids"].shape[1] :]), skip_special_tokens=True
    )
    return said.strip()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and bars off the terminal; what matters is in the report."""
    import warnings

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"KL(adapter||merged) {figures['kl_mean']:.2g}, "
        f"of KL(adapter||base) {figures['kl_adapter_base']:.2g}: ratio {figures['ratio']:.2g}, "
        f"top-1 agreement {figures['top1_agreement']:.2%}"
    )
