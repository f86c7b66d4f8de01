# ruff: noqa: T201
"""SmolLM2-135M quantized to every format that can be made here, with the quickstart's adapter merged to bf16.

`quantized_model.py` prints, for each format: the size of the base; KL(adapter || merged) on that base, nats
per token in float32, its share of KL(adapter || base), and how often both give the same token first; how
many of the merged weights' elements are not (W + scale * B @ A, in float32, rounded once), W by the format's
formula or by bitsandbytes, never by our decoder; and the seconds of the merge. The 16-bit model comes from
the quickstart's GGUF file by transformers; bitsandbytes quantizes its formats itself, the rest is rounded to
nearest.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from smollm2 import ROOT, write_dense
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models import tensors
from tests.quantizing import (
    BNB,
    Base,
    Format,
    awq_gemv,
    formats,
    gptq,
    hqq,
    is_linear,
    torchao_float8,
    torchao_intx,
    write_base,
    write_bitsandbytes,
)
from tests.running import merge

ADAPTER = ROOT / "quickstart/adapter"
SCALE = 2.0  # alpha 16, rank 8


GROUP = 64


def widths() -> dict[str, Format]:
    """Other widths and packings of the same formats."""
    told = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False, "group_size": GROUP}
    awq = {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": GROUP}
    return {
        **{f"GPTQ {bits} bit": Format(gptq(GROUP, bits=bits), {**told, "bits": bits}) for bits in (2, 3, 8)},
        "AWQ gemv": Format(awq_gemv(GROUP), awq),
        **{f"HQQ {bits} bit": Format(hqq(GROUP, bits), {"quant_method": "hqq"}) for bits in (8, 3, 2, 1)},
        "torchao float8": Format(torchao_float8, {"quant_method": "torchao"}),
        "torchao intx": Format(torchao_intx(GROUP), {"quant_method": "torchao"}),
    }


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def plain(name: str) -> None:
    """No format for any weight."""


def by_us(form: Format, folder: Path, dense: Path) -> Base:
    """All projections rounded to nearest."""
    config = config_of(dense) | {"quantization_config": form.config}
    return write_base(folder, tensors(dense), config, lambda name: form if is_linear(name) else None)


def by_bitsandbytes(settings: dict[str, Any], folder: Path, dense: Path) -> Base:
    return write_bitsandbytes(folder, dense, settings)


def probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Logarithms, float64, of every token."""
    with torch.inference_mode():
        return torch.cat([model(row[None]).logits[0].double().log_softmax(-1) for row in tokens])


def divergence(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


def different(base: Base, output: Path) -> tuple[int, int]:
    """(elements of merged weights that are not decoded + delta rounded once, all of them)."""
    lora, found, wrong, count = load_file(ADAPTER / "adapter_model.safetensors"), tensors(output), 0, 0
    for name, stored in found.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in lora:
            delta = SCALE * (lora[f"{key}B.weight"].float() @ lora[f"{key}A.weight"].float())
            wrong += int((stored != (base.weights[name].float() + delta).bfloat16()).sum())
            count += stored.numel()
    return wrong, count


def row(name: str, make: Callable[[Path, Path], Base], dense: Path, folder: Path, tokens: Tensor) -> str:
    """A line of the table."""
    base = make(folder / "base", dense)
    size = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    begun = time.monotonic()
    with redirect_stdout(StringIO()):
        merge(base.folder, ADAPTER, folder / "out")
    seconds = time.monotonic() - begun
    wrong, count = different(base, folder / "out")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.load_state_dict({n: w.float() for n, w in base.weights.items()}, strict=False)
    without = probabilities(model, tokens)
    adapted = probabilities(PeftModel.from_pretrained(model, str(ADAPTER)), tokens)
    merged = probabilities(AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32), tokens)
    off, does = divergence(adapted, merged), divergence(adapted, without)
    same = float((adapted.argmax(-1) == merged.argmax(-1)).double().mean())
    numbers = f"{size / 1e6:.0f} MB | {off:.2g} | {off / does:.2g} | {same:.1%}"
    return f"| {name} | {numbers} | {wrong} of {count:,} | {seconds:.1f} |"


def main() -> None:
    """All of them, or those whose names hold the first argument."""
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen: dict[str, Callable[[Path, Path], Base]] = {
        "none, bf16": lambda folder, dense: write_base(folder, tensors(dense), config_of(dense), plain),
        **{f"bnb {name}": partial(by_bitsandbytes, settings) for name, settings in BNB.items()},
        **{name: partial(by_us, form) for name, form in {**formats(GROUP), **widths()}.items()},
    }
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        write_dense(dense)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        text = (ROOT / "pipeline/ground/sample.txt").read_text()
        tokens = torch.tensor(tokenizer(text)["input_ids"][:256]).view(-1, 128)
        print("| format | base | KL(adapter, merged) | of KL(adapter, base) | top-1 | bits differ | s |")
        print("|---" * 7 + "|")
        for name, make in chosen.items():
            if wanted not in name:
                continue
            folder = Path(scratch) / "model"
            folder.mkdir()
            print(row(name, make, dense, folder, tokens), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
