# ruff: noqa: T201
"""Adapters merged into SmolLM2-135M in bfloat16 and extracted again with `rank=auto`: is the adapter back?

`round_trip.py FOLDER`: the quickstart's adapter (rank 8, attention), and that of `qlora.py` (rank 16, all
linear layers) if it is there, onto the 16-bit model. For each kind of module: ||delta|| / ||W|| (median), how
many get their rank back, and the distance to the true delta s * B @ A, in deltas, of the extracted one and of
the difference of the checkpoints, which bfloat16 has rounded: over all modules of the kind, of the worst one,
and how many of the extracted are the nearer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from smollm2 import ROOT, pipeline, write_dense
from torch import Tensor


def deltas(adapter: Path) -> dict[str, Tensor]:
    """s * B @ A of every module, in float64, by the name of its weight."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora, found = load_file(adapter / "adapter_model.safetensors"), {}
    alphas = config["alpha_pattern"] or {}
    for key, A in lora.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
            B = lora[f"{key.removesuffix('A.weight')}B.weight"]
            found[f"{module}.weight"] = alpha / len(A) * (B.double() @ A.double())
    return found


def rows(name: str, adapter: Path, folder: Path) -> list[str]:
    """Lines of the table."""
    dense, merged, back = folder / "dense", folder / "merged", folder / "back"
    pipeline(f"base_model={dense}", f"adapter={adapter}", f"output={merged}", "verify=structure")
    pipeline(
        "recipe=extract",
        f"base_model={dense}",
        f"finetune={merged}",
        f"output={back}",
        "rank=auto",
        "verify.tokens=0",
    )
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    true, found = deltas(adapter), deltas(back)
    before, after = load_file(dense / "model.safetensors"), load_file(merged / "model.safetensors")
    kinds: dict[str, list[tuple[int, float, float, float, float]]] = defaultdict(list)
    ranks = {
        key.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): len(A)
        for key, A in load_file(back / "adapter_model.safetensors").items()
        if key.endswith("lora_A.weight")
    }
    for weight, D in true.items():
        energy = float(D.square().sum())
        ours = float((found.get(weight, 0 * D) - D).square().sum())
        raw = float((after[weight].double() - before[weight].double() - D).square().sum())
        size = float(D.norm() / before[weight].double().norm())
        kinds[weight.split(".")[-2]].append((ranks.get(weight, 0), energy, ours, raw, size))
    shutil.rmtree(merged)
    shutil.rmtree(back)
    extra = len(found.keys() - true.keys())
    lines = [line(f"{name}, {kind}", some, rank) for kind, some in kinds.items()]
    every = [one for some in kinds.values() for one in some]
    return [*lines, line(f"{name}, all ({extra} modules beyond them)", every, rank)]


def line(said: str, some: list[tuple[int, float, float, float, float]], rank: int) -> str:
    """A line of the table."""
    energy = sum(e for _, e, _, _, _ in some)
    ours, raw = ((sum(one[n] for one in some) / energy) ** 0.5 for n in (2, 3))
    worst, its = max(((o / e) ** 0.5, (r / e) ** 0.5) for _, e, o, r, _ in some)
    nearer = sum(o < r for _, _, o, r, _ in some)
    others = sorted({r for r, *_ in some} - {rank})
    size = sorted(one[4] for one in some)[len(some) // 2]
    back = f"{sum(r == rank for r, *_ in some)} of {len(some)}" + (f", others {others}" if others else "")
    return f"| {said} | {size:.2g} | {back} | {ours:.4f} | {raw:.4f} | {worst:.4f} ({its:.4f}) | {nearer} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    if not (folder / "dense").is_dir():
        write_dense(folder / "dense")
    print(
        "| adapter | norm | rank back | extracted | difference | worst (difference) | nearer |\n"
        + "|---" * 7
        + "|"
    )
    adapters = {"quickstart": ROOT / "quickstart/adapter", "QLoRA": folder / "adapter"}
    for name, adapter in adapters.items():
        if adapter.is_dir():
            print(*rows(name, adapter, folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
