# ruff: noqa: T201
"""Extraction beside mergekit-extract-lora: wall clock, peak memory, and what is captured of the optimum.

`extraction.py make FOLDER` writes two layers of the shape of Llama-3.1-8B (vocabulary 1024) in bfloat16 and a
fine-tune of them, whose differences fall slowly (singular values i^-0.3) on top of a few large ones.
`extraction.py run FOLDER [--rank 32] [--mergekit VENV]` extracts with both, each as a process of its own.
`extraction.py error FOLDER ADAPTER` sets each module against the eigenvalues of D D^T in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, KV, VOCABULARY, LAYERS = 4096, 14336, 1024, 1024, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make(folder: Path) -> None:
    """Base and fine-tune; the difference is a sum of outer products with falling weights, and noise."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 0.02) -> torch.Tensor:
        return size * torch.randn(*shape, generator=random)

    base = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    base["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    tuned = dict(base)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{norm}.weight"
            base[name] = tuned[name] = torch.ones(HIDDEN)
        for module, (m, n) in SHAPES.items():
            name = f"model.layers.{layer}.{module}.weight"
            base[name] = normal(m, n)
            k = 512
            weights = torch.arange(1, k + 1).float() ** -0.3
            D = (normal(m, k, size=1.0) * weights) @ normal(k, n, size=1.0) + normal(m, n, size=4.0)
            tuned[name] = base[name] + D * (0.01 * base[name].norm() / D.norm())
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        held = {key: value.bfloat16().contiguous() for key, value in tensors.items()}
        save_file(held, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG, indent=2))


def run(command: list[str]) -> tuple[float, float]:
    """Seconds of wall clock, peak resident GB of a process."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: {said.decode()[-2000:]}")
    return time.monotonic() - begun, usage.ru_maxrss / 1e6


def beside(folder: Path, rank: int, mergekit: Path | None, method: str) -> None:
    base, tuned = folder / "base", folder / "tuned"
    for path in (base / "model.safetensors", tuned / "model.safetensors"):
        path.read_bytes()  # both find them in the page cache
    out = folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "recipe=extract", f"base_model={base}", f"finetune={tuned}"]
    command += [f"output={out}", f"rank={rank}", "verify=none", f"extract.method={method}"]
    wall, peak = run(command)
    spent = json.loads((out / "report.json").read_text())["save"]["seconds"]
    print(f"ours ({method}): {wall:.1f} s, peak {peak:.2f} GB; {spent:.1f} s of it extracting")
    if mergekit:
        theirs = folder / "theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        command = [str(mergekit / "bin" / "mergekit-extract-lora"), "--model", str(tuned), "--base-model"]
        command += [str(base), "--out-path", str(theirs), f"--max-rank={rank}"]
        wall, peak = run(command)
        print(f"mergekit: {wall:.1f} s, peak {peak:.2f} GB")


def errors(folder: Path, adapter: Path, layers: int) -> None:
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    factors = load_file(adapter / "adapter_model.safetensors")
    said = json.loads((adapter / "adapter_config.json").read_text())
    print(f"{'module':40}{'captured':>10}{'optimal':>10}{'ratio':>10}{'error / optimal':>17}")
    for layer in range(layers):
        for module in SHAPES:
            name = f"model.layers.{layer}.{module}"
            D = tuned[f"{name}.weight"].float() - base[f"{name}.weight"].float()
            D = D.T if D.shape[0] > D.shape[1] else D
            A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
            rank = A.shape[0]
            made = said["lora_alpha"] / rank * (B @ A)
            made = made.T if made.shape != D.shape else made
            total = float(D.double().square().sum())
            left = float((D - made).double().square().sum())
            G = sum(part.double() @ part.double().T for part in D.split(2048, 1))
            best = float(torch.linalg.eigvalsh(G)[-rank:].sum())
            ratio, off = (total - left) / best, (left / (total - best)) ** 0.5
            print(f"{name:40}{1 - left / total:10.5f}{best / total:10.5f}{ratio:10.6f}{off:17.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "run", "error"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    a = parser.parse_args()
    if a.what == "make":
        make(a.folder)
    elif a.what == "run":
        beside(a.folder, a.rank, a.mergekit, a.method)
    else:
        errors(a.folder, a.adapter, a.layers)


if __name__ == "__main__":
    main()
