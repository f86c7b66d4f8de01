"""A tokenizer of bytes, and small models that are really trained: whose inputs have directions."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def source() -> str:
    """Python, of which the model learns the first half."""
    return (files("pipeline") / "stage.py").read_text("utf-8") + (files("pipeline") / "weight.py").read_text()


def half(text: str, number: int) -> str:
    return text[: len(text) // 2] if number == 0 else text[len(text) // 2 :]


def train(model: Any, text: str, steps: int, rate: float) -> None:
    """Adam on random stretches of a text."""
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"])
    random = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (8,), generator=random)
        batch = torch.stack([ids[at : at + LENGTH] for at in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
        adam.zero_grad()


def trained_pair(folder: Path) -> tuple[Path, Path]:
    """A trained byte-level Llama of two layers, and the same with a difference of full rank in each matrix.

    What training itself gives lies along the inputs already, so that weights alone do nearly as well.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes))
    train(model, half(source(), 0), 60, 4e-3)
    save(model, folder / "base")
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            U, _, V = torch.linalg.svd(torch.randn(parameter.shape, generator=random), full_matrices=False)
            D = U * torch.arange(1, U.shape[1] + 1) ** -0.3 @ V
            parameter.data += D * (0.2 * parameter.data.norm() / D.norm())
    save(model, folder / "tuned")
    return folder / "base", folder / "tuned"


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
