# ruff: noqa: T201
"""Speed and memory of merging on quantized bases, beside `cp` and beside bitsandbytes' own dequantization.

`quantized_speed.py [FORMAT ...] [--layers 4] [--rounds 3]` writes Llama layers (2048 x 8192, 0.49 GB as
bf16) with codes of each format and a LoRA of rank 16 on all of them, and prints gigabytes of bf16 output per
second: `decode`, tiles of float32 alone; `merge`, with the delta added and rounded; `run`, the whole of it,
with reading headers, statistics, SHA-256 of all that is read and written, and writing; `bnb`, bitsandbytes'
own decoding to bfloat16 of tensors in memory; `cp`, of a file of the output's size. These come from seconds
of CPU divided by the cores, medians of the rounds, because the machine is shared; the `wall` columns from
the clock. Every format runs in a process of its own, on a thread a core. Memory is its peak less what it had
before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.quantizing import Format, Written, formats, is_linear, write_base

LINEAR = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
CORES = len(os.sched_getaffinity(0))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": True, "dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


def bitsandbytes(settings: dict[str, Any]) -> Format:
    """Quantized by bitsandbytes, without a model around it."""
    from bitsandbytes import functional

    def four(weight: Tensor) -> Written:
        kind, nested = settings["bnb_4bit_quant_type"], settings.get("bnb_4bit_use_double_quant", False)
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=kind
        )
        parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return Written({"weight": codes, **parts}, weight)

    def eight(weight: Tensor) -> Written:
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        zero = torch.tensor(0, dtype=torch.uint8)
        return Written({"weight": codes, "SCB": scale, "weight_format": zero}, weight)

    told = {"quant_method": "bitsandbytes", **settings}
    return Format(eight if settings.get("load_in_8bit") else four, told)


def all_formats() -> dict[str, Format | None]:
    """By name; None leaves the weights in bfloat16."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {
        "bf16": None,
        "bnb nf4": bitsandbytes(four),
        "bnb nf4, nested": bitsandbytes(four | {"bnb_4bit_use_double_quant": True}),
        "bnb int8": bitsandbytes({"load_in_8bit": True}),
        **formats(128),
    }


def write(folder: Path, form: Format | None, layers: int) -> None:
    """`base` and `adapter`; all layers are alike, so that they are quantized once."""
    random = torch.Generator().manual_seed(0)
    one = {name: 0.02 * torch.randn(*shape, generator=random) for name, shape in LINEAR.items()}
    done: dict[int, Written] = {}

    def once(weight: Tensor) -> Written:
        assert form is not None
        if id(weight) not in done:
            done[id(weight)] = form.write(weight)
        written = done[id(weight)]
        return Written({n: t.clone() for n, t in written.tensors.items()}, weight, written.metadata)

    dense: dict[str, Tensor] = {"model.embed_tokens.weight": torch.zeros(256, 2048).bfloat16()}
    lora = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            module = f"model.layers.{layer}.{name}"
            dense[f"{module}.weight"] = one[name] if form else one[name].bfloat16()
            key = f"base_model.model.{module}"
            lora[f"{key}.lora_A.weight"] = torch.randn(16, columns, generator=random) * 0.01
            lora[f"{key}.lora_B.weight"] = torch.randn(rows, 16, generator=random) * 0.01
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dense[f"model.layers.{layer}.{norm}.weight"] = torch.ones(2048).bfloat16()
    dense["model.norm.weight"] = torch.ones(2048).bfloat16()
    config = {**CONFIG, "num_hidden_layers": layers}
    if form:
        config["quantization_config"] = form.config
    choose = lambda name: Format(once, {}) if form and is_linear(name) else None  # noqa: E731
    write_base(folder / "base", dense, config, choose)
    (folder / "adapter").mkdir()
    save_file(lora, folder / "adapter/adapter_model.safetensors", {"format": "pt"})
    told = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": [n.split(".")[1] for n in LINEAR],
    }
    (folder / "adapter/adapter_config.json").write_text(json.dumps(told))


def memory(key: str) -> float:
    """This process's memory in MB: VmRSS, resident now, or VmHWM, at its peak."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1e3


def spent() -> tuple[float, float]:
    """Seconds of the clock, and of CPU in this process and its children, over the cores."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), sum(used.ru_utime + used.ru_stime for used in both) / CORES


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(clock, CPU) seconds of an action."""
    begun = spent()
    action()
    ended = spent()
    return ended[0] - begun[0], ended[1] - begun[1]


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of the three, and memory; in a process of its own."""
    from pipeline.ground import tiles
    from pipeline.ground.parallel import keep_freed_memory, plain_arithmetic
    from pipeline.ground.report import Report
    from pipeline.ground.rounding import round_to
    from pipeline.merging.pieces import Merged
    from pipeline.weight import Decoded, Dense, Tile, Tiles, Weight
    from tests.running import merge, pipeline

    keep_freed_memory()
    made = pipeline(folder / "base", folder / "adapter", folder / "out")
    merged = [
        w for w in made.merge(made.dequantize(made.load()), made.extract()).weights if isinstance(w, Merged)
    ]
    (torch.ones(1 << 20) @ torch.ones(1 << 20)).item()
    before = memory("VmRSS")

    def decode(tile: Tile) -> None:
        tile.value.float()

    def store(tile: Tile) -> None:
        round_to(tile.value, "BF16")

    def tile(rows: Tiles, use: Callable[[Tile], None], cut: tuple[int, int]) -> None:
        use(rows(*cut))

    def passed(weights: list[Weight], use: Callable[[Tile], None]) -> None:
        with ThreadPoolExecutor(CORES) as pool, plain_arithmetic():
            for weight in weights:
                with weight.open("cpu") as rows:
                    grid = tiles.grid(weight.num_rows, weight.num_columns, weight.grain)
                    list(pool.map(partial(tile, rows, use), grid))

    bases: list[Weight] = [w.base for w in merged]
    assert all(isinstance(w, Decoded | Dense) for w in bases)
    figures: dict[str, Any] = {"decode": timed(lambda: passed(bases, decode))}
    figures["merge"] = timed(lambda: passed([*merged], store))
    figures["memory"] = memory("VmHWM") - before
    reports: list[Report] = []

    def run() -> None:
        reports.append(merge(folder / "base", folder / "adapter", folder / f"out{len(reports)}"))

    run()  # the first one imports what it needs
    cpu = timed(run)[1]
    figures["run"] = reports[1].save["seconds"], cpu
    figures["peak"] = memory("VmHWM") - before
    figures["plan"] = reports[0].plan.peak_memory / 1e6
    for number in range(2):
        shutil.rmtree(folder / f"out{number}")
    return figures


def by_bitsandbytes(folder: Path) -> tuple[float, float]:
    """Seconds in which bitsandbytes decodes the base to bfloat16, its tensors in memory."""
    from bitsandbytes import functional

    from tests.models import tensors

    held = tensors(folder / "base")
    names = [n for n in held if n.endswith("proj.weight")]
    if "SCB" in {n.rpartition(".")[2] for n in held}:
        scales = [held[n.removesuffix("weight") + "SCB"] for n in names]
        decode = [
            partial(functional.int8_vectorwise_dequant, held[n], s)
            for n, s in zip(names, scales, strict=True)
        ]
    else:
        parts = [
            {k.removeprefix(f"{n}."): t for k, t in held.items() if k.startswith(f"{n}.")} for n in names
        ]
        states = [functional.QuantState.from_dict(p, torch.device("cpu")) for p in parts]
        for state in states:
            state.dtype = torch.bfloat16
        decode = [partial(functional.dequantize_4bit, held[n], s) for n, s in zip(names, states, strict=True)]
    return timed(lambda: [call().to(torch.bfloat16) for call in decode])


def child(what: str, folder: Path) -> Any:
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def copied(source: Path) -> tuple[float, float]:
    """Seconds of `cp`."""
    target = source.with_suffix(".copy")
    seconds = timed(lambda: subprocess.run(["cp", source, target], check=True))
    target.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["measure", "bitsandbytes"])
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure(a.folder) if a.child == "measure" else by_bitsandbytes(a.folder)))
        return
    chosen = {n: f for n, f in all_formats().items() if not a.formats or n in a.formats}
    size = 2e-9 * a.layers * sum(rows * columns for rows, columns in LINEAR.values())
    print(f"GB of bf16 output per second, of {size:.2f} GB, on {CORES} cores; memory in MB")
    print(
        "| format | decode | merge | run | bnb | cp | decode, wall | run, wall | cp, wall | peak | planned |"
    )
    print("|---" * 11 + "|")
    with tempfile.TemporaryDirectory(dir=a.folder) as scratch:
        blob, folder = Path(scratch) / "blob", Path(scratch) / "model"
        blob.write_bytes(os.urandom(1 << 20) * int(size * 1e9 / (1 << 20)))
        for name, form in chosen.items():
            folder.mkdir()
            write(folder, form, a.layers)
            rows: list[dict[str, Any]] = []
            for _ in range(a.rounds):
                figures = child("measure", folder)
                if name.startswith("bnb"):
                    figures["bnb"] = child("bitsandbytes", folder)
                rows.append({**figures, "cp": copied(blob)})
            speeds = [
                f"{size / median(row[key][clock] for row in rows):.2f}" if key in rows[0] else "-"
                for clock, keys in ((1, "decode merge run bnb cp"), (0, "decode run cp"))
                for key in keys.split()
            ]
            memories = [f"{median(row[key] for row in rows):.0f}" for key in ("peak", "plan")]
            print(f"| {' | '.join([name, *speeds, *memories])} |", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
