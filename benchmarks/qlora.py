# ruff: noqa: T201
"""A QLoRA adapter of SmolLM2-135M, merged onto every base and stored in every way: what each choice costs.

`qlora.py FOLDER`: needs some GB there, and uses what it has made there before. bitsandbytes makes the NF4
form (nested scales, bfloat16 compute); a LoRA of rank 16 on all linear layers is trained on what it decodes,
in float32. Then `python -m pipeline -m` merges it onto the NF4 checkpoint, onto the 16-bit model pushed
through NF4 (dequantize=simulate) and onto the 16-bit model itself, in many dtypes and formats.

Every output is decoded by bitsandbytes, or by the formula, and run by transformers in float32; the reference
is always PEFT's unmerged adapter on the NF4 base that it was trained on. KL and loss are nats a token, of
held-out text. "KL, declared base" is what our verification saw: the adapter on that run's base, its output.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from smollm2 import Figures, Reference, held_out, load, pipeline, sequences, texts, train, write_dense
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.quantizing import BNB, write_bitsandbytes

Row = dict[str, str]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, STEPS, RATE = 16, 60, 2e-3


def make(folder: Path) -> None:
    """In FOLDER: dense, nf4, what that means in decoded.pt, adapter, held.txt."""
    dense, nf4 = folder / "dense", folder / "nf4"
    if not dense.is_dir():
        write_dense(dense)
    if not nf4.is_dir():
        base = write_bitsandbytes(nf4, dense, BNB["nf4, nested"])
        torch.save(dict(base.weights), folder / "decoded.pt")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(dense / name, nf4 / name)
    text, held = texts()
    (folder / "held.txt").write_text(held)
    if not (folder / "adapter").is_dir():
        torch.manual_seed(0)
        base = load(dense, torch.load(folder / "decoded.pt"))
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR)
        model = get_peft_model(base, config)
        begun = time.monotonic()
        loss = train(model, sequences(dense, text), STEPS, RATE)
        print(f"trained {STEPS} steps in {time.monotonic() - begun:.0f} s, loss {loss:.3f}", file=sys.stderr)
        model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct-bnb-4bit"
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)


def decoded(folder: Path) -> dict[str, Tensor]:
    """What an output's tensors mean in float32: by bitsandbytes, FP8 blocks by their formula."""
    held = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in held.items():
        if name.endswith((".SCB", ".weight_scale_inv", ".weight_format")) or ".weight." in name:
            continue
        state = {key.removeprefix(f"{name}."): t for key, t in held.items() if key.startswith(f"{name}.")}
        module = name.removesuffix("weight")
        if state:
            known = functional.QuantState.from_dict(state, torch.device("cpu"))
            known.dtype = torch.float32
            found[name] = functional.dequantize_4bit(tensor, known)
        elif f"{module}SCB" in held:
            found[name] = functional.int8_vectorwise_dequant(tensor, held[f"{module}SCB"])
        elif (scale := held.get(f"{module}weight_scale_inv")) is not None:
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] = tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]
        else:
            found[name] = tensor.float()
    return found


@dataclass(frozen=True)
class Sweep:
    """Runs of our command line that differ in the axes `over`."""

    said: str
    arguments: tuple[str, ...]
    over: dict[str, tuple[str, ...]]

    def run(self, out: Path, common: Sequence[str]) -> Iterator[tuple[str, Path, Row]]:
        """Each run: what it is called, its folder, its row of sweep.csv."""
        axes = [f"{key}={','.join(values)}" for key, values in self.over.items()]
        pipeline("-m", f"output={out}", *common, *self.arguments, *axes, passes=False)
        with (out / "sweep.csv").open() as file:
            rows = {frozenset(row["run"].split(",")): row for row in csv.DictReader(file)}
        for values in product(*self.over.values()):
            row = rows[frozenset(f"{key}={value}" for key, value in zip(self.over, values, strict=True))]
            folder = out / row["run"]
            if not folder.is_dir():
                folder = out / f"{row['run']}.rejected"
            yield ", ".join((self.said, *values)), folder, row


def sweeps(folder: Path) -> list[Sweep]:
    """Base choice x dtype x rounding; what is quantized is merged onto what training saw."""
    nf4, dense = f"base_model={folder / 'nf4'}", f"base_model={folder / 'dense'}"
    roundings = ("nearest", "stochastic", "auto")
    return [
        Sweep("NF4 base", (nf4,), {"save.dtype": ("bfloat16", "float16", "float32")}),
        Sweep("NF4 base, bfloat16", (nf4, "save.dtype=bfloat16"), {"save.rounding": roundings[1:]}),
        Sweep(
            "16-bit base",
            (dense,),
            {"dequantize": ("simulate", "none"), "save.dtype": ("bfloat16", "float16")},
        ),
        Sweep("NF4 base", (nf4,), {"save.quantize": ("int8", "nf4-dq", "keep")}),
        Sweep("NF4 base, fp8-block", (nf4, "save.quantize=fp8-block"), {"save.rounding": roundings}),
    ]


def shifts(folder: Path) -> str:
    """||W16 - decoded NF4|| / ||delta|| of every merged weight, all elements of it, in float64."""
    dense, nf4 = load_file(folder / "dense/model.safetensors"), torch.load(folder / "decoded.pt")
    lora, found = load_file(folder / "adapter/adapter_model.safetensors"), {}
    for key, A in lora.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            delta = 2 * lora[key.replace("lora_A", "lora_B")].double() @ A.double()
            found[name] = float((dense[name].double() - nf4[name].double()).norm() / delta.norm())
    most = max(found, key=lambda name: found[name])
    return f"median {median(found.values()):.3g} of {len(found)}, {found[most]:.3g} in {most}"


def told(folder: Path) -> Iterator[str]:
    """What our reports say of the choice of a base: where it is left open, and where it is made."""
    for way in ("auto", "simulate"):
        out = folder / "told"
        asked = [f"base_model={folder / 'dense'}", f"adapter={folder / 'adapter'}", f"output={out}"]
        pipeline(*asked, f"dequantize={way}", "verify=structure")
        findings = json.loads((out / "report.json").read_text())["findings"]
        yield from (f"dequantize={way}: {text}" for text in findings if "the delta" in text)
        shutil.rmtree(out)


def loaded(folder: Path, compute: torch.dtype) -> Any:
    """The NF4 checkpoint as transformers and bitsandbytes run it, four bits decoded in every forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, device_map="cpu")
    for parameter in model.parameters():  # transformers 5.23 leaves them in bfloat16
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = compute
            module.support_avx512bf16_for_cpu = compute is torch.bfloat16
    return model.eval()


def line(said: str, found: Figures, does: float, row: Row) -> str:
    """A line of the table."""

    def cell(key: str, form: str, unit: float = 1) -> str:
        return format(float(row[key]) / unit, form) if row.get(key) else "-"

    own, kept = cell("kl", ".1e"), cell("retained", ".4f")
    ours = f"{own} | {kept} | {cell('size', '.0f', 1e6)} | {cell('seconds', '.1f')}"
    return (
        f"| {said} | {found.kl:.2g} | {found.kl / does:.2g} | {found.top1:.1%} | {found.loss:.4f} | {ours} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    make(folder)
    dense, state, tokens = folder / "dense", torch.load(folder / "decoded.pt"), held_out(folder / "dense")
    model = PeftModel.from_pretrained(load(dense, state), str(folder / "adapter"))
    reference = Reference(model.eval(), tokens)
    adapted, base = reference.beside(model), reference.beside(load(dense, state))
    print("| merged onto, stored as | KL | / KL(base) | top-1 | loss | KL, declared base | kept | MB | s |")
    print("|---" * 9 + "|")
    print(line("the adapter itself, unmerged", adapted, base.kl, {}))
    print(line("NF4 base without it", base, base.kl, {}))
    print(line("16-bit base without it", reference.beside(load(dense)), base.kl, {}))
    asked = [f"adapter={folder / 'adapter'}", f"verify.text={folder / 'held.txt'}", "verify.tokens=256"]
    for sweep in sweeps(folder):
        for said, output, row in sweep.run(folder / "out", [*asked, "verify.min_retained=0"]):
            print(line(said, reference.beside(load(dense, decoded(output))), base.kl, row), flush=True)
        shutil.rmtree(folder / "out")
    print(f"\n||W16 - NF4|| / ||delta||, computed here: {shifts(folder)}")
    print(*told(folder), sep="\n")
    own = Reference(load(dense, state), tokens[:2])
    for compute in (torch.float32, torch.bfloat16):
        kl = own.beside(loaded(folder / "nf4", compute)).kl
        print(f"KL(decoded, float32 || four bits in {compute}) of the base alone: {kl:.2g}")


if __name__ == "__main__":
    main()
