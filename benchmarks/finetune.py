# ruff: noqa: T201
"""A full fine-tune of SmolLM2-135M, extracted at many ranks: size, captured energy, and what the LoRA does.

`finetune.py FOLDER`: needs some GB there, and uses what it has made there before. All weights are trained in
float32 on the text of `smollm2.py` and stored in bfloat16. Each adapter is what `python -m pipeline
recipe=extract` makes of it: matrices in low rank, embeddings among them, norms whole, factors in float32.
PEFT loads it onto the base; KL and loss are nats a token, of held-out text, in float32. "captured" is our
report's share of ||D||^2 over all matrices; the seconds are those of the whole process, without logits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from smollm2 import Figures, Reference, held_out, load, pipeline, sequences, texts, train, write_dense

STEPS, RATE = 40, 1e-4
RANKS = ("8", "16", "32", "64", "128", "256", "auto", "{energy: 0.9}", "{parameters: 10M}")
NARROW = "rank_pattern={k_proj: 192, v_proj: 192}"  # which have no more rows


def make(folder: Path) -> None:
    """In FOLDER: dense, and tuned."""
    dense, tuned = folder / "dense", folder / "tuned"
    if not dense.is_dir():
        write_dense(dense)
    if not tuned.is_dir():
        torch.manual_seed(0)
        model, begun = load(dense), time.monotonic()
        loss = train(model, sequences(dense, texts()[0]), STEPS, RATE)
        print(f"trained {STEPS} steps in {time.monotonic() - begun:.0f} s, loss {loss:.3f}", file=sys.stderr)
        shutil.copytree(dense, tuned, ignore=shutil.ignore_patterns("*.safetensors"))
        model.bfloat16().save_pretrained(tuned)


def line(said: str, about: str, found: Figures, does: float) -> str:
    """A line of the table."""
    return (
        f"| {said} | {about} | {found.kl:.2g} | {found.kl / does:.3f} | {found.top1:.1%} | {found.loss:.4f} |"
    )


def extracted(out: Path) -> str:
    """What the report says: ranks, size, energy."""
    report = json.loads((out / "report.json").read_text())
    facts = [f for f in report["extraction"]["weights"].values() if "rank" in f and f.get("energy")]
    energy = sum(f["energy"] for f in facts)
    captured = sum(f["energy"] * f["captured"] for f in facts) / energy
    ranks = [f["rank"] for f in facts]
    size = (out / "adapter_model.safetensors").stat().st_size / 1e6
    return f"{median(ranks):.0f}, {min(ranks)}-{max(ranks)} | {size:.1f} | {captured:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    make(folder)
    dense, tuned, out = folder / "dense", folder / "tuned", folder / "extracted"
    model = load(tuned)
    reference = Reference(model, held_out(dense))
    itself, base = reference.beside(model), reference.beside(load(dense))
    del model
    print(
        "| rank | median, range | MB | captured | s | KL | / KL(base) | top-1 | loss |\n" + "|---" * 9 + "|"
    )
    size = (tuned / "model.safetensors").stat().st_size / 1e6
    print(line("the fine-tune itself", f"- | {size:.0f} | 1 | -", itself, base.kl))
    print(line("base", "- | 0 | 0 | -", base, base.kl), flush=True)
    for rank in RANKS:
        asked = [f"base_model={dense}", f"finetune={tuned}", f"output={out}", f"rank={rank}"]
        asked += [NARROW] if rank == "256" else []
        seconds = pipeline("recipe=extract", *asked, "verify.tokens=0")
        found = reference.beside(PeftModel.from_pretrained(load(dense), str(out)).eval())
        print(line(rank, f"{extracted(out)} | {seconds:.0f}", found, base.kl), flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
