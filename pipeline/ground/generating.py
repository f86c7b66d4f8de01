"""What a model says to prompts, greedily, for people to read beside what others say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NEW_TOKENS = 48


def answers_to(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """What the model says to each prompt, greedily; nothing where it cannot generate."""
    if tokenizer is None or not hasattr(model, "generate"):
        return []
    return [_answer(model, tokenizer, prompt) for prompt in prompts]


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
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
