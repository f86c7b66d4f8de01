# ruff: noqa: T201
"""Extraction by outputs beside extraction by weights, on a small model that was really trained and tuned.

`calibration.py make FOLDER` trains a byte-level Llama on Python's own documentation, and then all of its
weights on the source of Python's library: minutes on two cores, no download. FOLDER/random gets differences
as large, but with no direction, where training gives ones that lie along its inputs already.
`calibration.py run FOLDER [--ranks 4,16]` extracts, loads each adapter with PEFT, and prints what it holds of
the weights and of the outputs, and KL(finetune||extracted) / KL(finetune||base) on source never seen. Any
folder with base/, tuned/, calibration.txt and held.txt will do.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.extraction.calibrating import Calibrating
from pipeline.extraction.choice import Rest
from pipeline.ground.adapter_format import WEIGHTS
from pipeline.ground.divergence import divergence
from pipeline.ground.ranks import Budget, Rank
from pipeline.stages.extract.svd import Svd

LENGTH = 128
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LINEAR = ("self_attn", "mlp")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(model: Any, ids: torch.Tensor, steps: int, rate: float) -> None:
    """Adam on random stretches of the text, with a linear fall of the rate."""
    random = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (8,), generator=random)
        batch = torch.stack([ids[at : at + LENGTH] for at in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        adam.step()
        adam.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {float(loss) / 0.6931:.3f} bits per byte", flush=True)


def make(folder: Path, steps: int) -> None:
    """Base and fine-tune, and three texts: the fine-tune's, one to calibrate with, one to judge by."""
    tokenizer = byte_tokenizer()
    files = sorted(Path(inspect.getfile(inspect)).parent.glob("*.py"))
    english = "\n".join(topics.topics.values())
    source = ["\n".join(f.read_text("utf-8", "ignore") for f in files[part::4]) for part in range(4)]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, max_position_embeddings=2 * LENGTH, **SIZES)
    model = LlamaForCausalLM(config)
    train(model, torch.tensor(tokenizer(english)["input_ids"]), steps, 2e-3)
    save(model, tokenizer, folder / "base")
    train(model, torch.tensor(tokenizer(source[0] + source[1])["input_ids"]), steps // 2, 1e-3)
    save(model, tokenizer, folder / "tuned")
    for name in ("base", "calibration.txt", "held.txt"):
        (folder / "random").mkdir(exist_ok=True)
        (folder / "random" / name).symlink_to(folder.absolute() / name)
    save(at_random(load(folder / "base"), model), tokenizer, folder / "random" / "tuned")
    (folder / "calibration.txt").write_text(source[2][:60_000], "utf-8")
    (folder / "held.txt").write_text(source[3], "utf-8")


def at_random(model: Any, tuned: Any) -> Any:
    """The base with as large a difference in each matrix of the layers, of singular values i^-0.3."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            m, n = parameter.shape
            U, _, V = torch.linalg.svd(torch.randn(m, n, generator=random), full_matrices=False)
            D = U * torch.arange(1, min(m, n) + 1) ** -0.3 @ V
            size = (tuned.get_parameter(name) - parameter).norm()
            parameter.data += D * (size / D.norm())
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class SeenByBase(Svd):
    """The inputs as the base sees them, for comparison."""

    @cached_property
    def _calibrating(self) -> Calibrating | None:
        found = super()._calibrating
        assert found
        return replace(found, tuned=self._base)


def extract(folder: Path, rank: Rank, cls: type[Svd], text: Path | None, **settings: Any) -> tuple[Path, Any]:
    """The adapter's folder, and what is said of each parameter."""
    output = folder / "out"
    shutil.rmtree(output.with_name("out.partial"), ignore_errors=True)
    stage = cls(
        adapter=(),
        base_model=str(folder / "base"),
        finetune=str(folder / "tuned"),
        output=output,
        targeted_modules=LINEAR,
        rest=Rest.save,
        rank=rank,
        calibration=str(text) if text else None,
        **settings,
    )
    stage.check()
    part = stage().parts[0]
    assert part.extraction
    return part.origin.folder, part.extraction.facts


def predictions(model: Any, sequences: torch.Tensor) -> Iterator[torch.Tensor]:
    for one in sequences:
        with torch.inference_mode():
            yield model.eval()(input_ids=one[None]).logits[0].float().log_softmax(-1)


def run(folder: Path, ranks: list[int], num_sequences: int, settings: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = torch.tensor(tokenizer((folder / "held.txt").read_text("utf-8"))["input_ids"])
    all_sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    picks = torch.linspace(0, len(all_sequences) - 1, num_sequences).long()
    held = all_sequences[picks]
    wanted = list(predictions(load(folder / "tuned"), held))
    effect = mean_kl(wanted, predictions(load(folder / "base"), held))
    print(f"KL(finetune||base) {effect:.4f} nats on {held.numel()} tokens")
    text = folder / "calibration.txt"
    ways: dict[str, tuple[type[Svd], Path | None]] = {
        "weights": (Svd, None),
        "outputs": (Svd, text),
        "outputs, base's inputs": (SeenByBase, text),
    }
    print(f"{'rank':>12} {'by':24}{'elements':>10}{'weights':>9}{'outputs':>9}{'KL ratio':>10}")
    for rank in ranks:
        size = 0
        for rule in (rank, None):
            for way, (cls, calibration) in ways.items():
                given = rule or Budget(size, in_bytes=False)
                own = settings if calibration else {}
                adapter, facts = extract(folder, given, cls, calibration, **own)
                model = PeftModel.from_pretrained(load(folder / "base"), str(adapter))
                held_elements = {k: v.numel() for k, v in load_file(adapter / WEIGHTS).items()}
                elements = sum(n for key, n in held_elements.items() if ".lora_" in key)
                size = size or sum(held_elements.values())  # with norms and embeddings, which are saved
                ratio = mean_kl(wanted, predictions(model, held)) / effect
                energy = sum(f["energy"] for f in facts.values())
                weights = sum(f["captured"] * f["energy"] for f in facts.values()) / energy
                seen = [f["outputs_captured"] for f in facts.values() if "outputs_captured" in f]
                outputs = f"{sum(seen) / len(seen):.4f}" if seen else "-"
                told = str(rule) if rule else "as many"
                print(f"{told:>12} {way:24}{elements:10}{weights:9.4f}{outputs:>9}{ratio:10.4f}", flush=True)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def mean_kl(wanted: list[torch.Tensor], found: Iterator[torch.Tensor]) -> float:
    """Nats per token."""
    sums = [float(divergence(p, q).mean()) for p, q in zip(wanted, found, strict=True)]
    return sum(sums) / len(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", default="4,16")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shrinkage", type=float, default=0.01)
    a = parser.parse_args()
    if a.what == "make":
        make(a.folder, a.steps)
    else:
        settings = {"calibration_tokens": a.tokens, "shrinkage": a.shrinkage}
        run(a.folder, [int(rank) for rank in a.ranks.split(",")], a.sequences, settings)


if __name__ == "__main__":
    main()
