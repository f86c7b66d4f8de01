# ruff: noqa: T201
"""What rounding keeps of a delta, by its size: the QLoRA adapter of `qlora.py`, made smaller by merge.weight.

`rounding.py FOLDER`, the folder of `qlora.py`. The bases lie on the very grid that is rounded to, as is
usual: the bfloat16 model stored in bfloat16 again, its FP8 form (blocks of 128) in FP8 again. The weights
are such that ||delta|| / ||W|| of all merged weights together is 1e-3, 3e-3, 1e-2 and 3e-2. "kept" is our
report's; KL, in nats a token of 1,024 held-out ones, is of PEFT's unmerged adapter on that base, its scale
multiplied by the same weight, against the output, decoded and run as in `qlora.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from qlora import Sweep, decoded, make
from safetensors.torch import load_file
from smollm2 import Reference, held_out, load
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.quantizing import formats, is_linear, write_base

NORMS = (1e-3, 3e-3, 1e-2, 3e-2)
ROUNDINGS = ("nearest", "stochastic", "auto")


def relative_norm(folder: Path, state: dict[str, Tensor]) -> float:
    """||delta|| / ||W|| of all merged weights together, at weight 1."""
    lora, deltas, weights = load_file(folder / "adapter/adapter_model.safetensors"), 0.0, 0.0
    for key, A in lora.items():
        if key.endswith("lora_A.weight"):
            W = state[key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")]
            deltas += float((2 * lora[key.replace("lora_A", "lora_B")] @ A).double().square().sum())
            weights += float(W.double().square().sum())
    return float((deltas / weights) ** 0.5)


def fp8(folder: Path) -> dict[str, Tensor]:
    """FOLDER/fp8, rounded to nearest by the formula, and what it means."""
    shutil.rmtree(folder / "fp8", ignore_errors=True)
    form = formats()["FP8 block"]
    config = json.loads((folder / "dense/config.json").read_text()) | {"quantization_config": form.config}
    weights = load_file(folder / "dense/model.safetensors")
    return write_base(folder / "fp8", weights, config, lambda n: form if is_linear(n) else None).weights


def weakened(folder: Path, state: dict[str, Tensor], weight: float) -> Any:
    """The adapter on a base of these weights, unmerged, with its scale multiplied by the weight."""
    model = PeftModel.from_pretrained(load(folder / "dense", state), str(folder / "adapter"))
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            scaling["default"] *= weight
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    make(folder)
    dense = folder / "dense"
    plain = load_file(dense / "model.safetensors")
    bases = {
        "dense": ("bfloat16", "save.dtype=bfloat16", plain),
        "fp8": ("FP8", "save.quantize=keep", fp8(folder)),
    }
    tokens, whole = held_out(dense)[::2], relative_norm(folder, plain)
    print(f"||delta|| / ||W|| of the adapter as it was trained: {whole:.3g}\n")
    print(
        "| norm | base and output | rounding | kept | KL(base) | KL | / KL(base) | top-1 |\n"
        + "|---" * 8
        + "|"
    )
    for norm in NORMS:
        weight = f"{norm / whole:.6f}"
        for name, (said, form, state) in bases.items():
            reference = Reference(weakened(folder, state, float(weight)), tokens)
            does = reference.beside(load(dense, state)).kl
            asked = [f"base_model={folder / name}", f"adapter={folder / 'adapter'}", f"merge.weight={weight}"]
            sweep = Sweep(said, (form, "verify=structure"), {"save.rounding": ROUNDINGS})
            for what, output, row in sweep.run(folder / "rounded", asked):
                found = reference.beside(load(dense, decoded(output)))
                numbers = f"{does:.2g} | {found.kl:.2g} | {found.kl / does:.2g} | {found.top1:.1%}"
                line = f"{what.replace(', ', ' | ')} | {float(row['retained']):.4f} | {numbers}"
                print(f"| {norm:g} | {line} |", flush=True)
            shutil.rmtree(folder / "rounded")


if __name__ == "__main__":
    main()
