"""One adapter kind on small modules: what our deltas make of their weights, beside PEFT's own merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.kind import Kind, Trained
from pipeline.ground.rounding import round_to
from pipeline.ground.shards import Entry, read_shard

WHOLE = 2**20  # as a block: all rows at once
PREFIX = "base_model.model."
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_adapter(folder: Path, model: torch.nn.Module, config: PeftConfig, size: float = 0.05) -> Path:
    """A random adapter of this kind, saved by PEFT; every trained parameter gets noise of that size added."""
    torch.manual_seed(1)
    tuned = get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += torch.randn_like(parameter.data.float()).to(parameter.dtype) * size
    tuned.save_pretrained(folder)
    return folder


def merged_by_peft(model: torch.nn.Module, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The state dict after PEFT's own load and merge, in its default mode."""
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(**options)
    state: dict[str, torch.Tensor] = merged.state_dict()
    return state


def deltas(folder: Path, kind: Kind) -> list[Delta]:
    """What the kind reads out of an adapter folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    modules: dict[str, dict[str, Entry]] = {}
    shared: dict[str, Entry] = {}
    for entry in read_shard(folder / "adapter_model.safetensors").entries:
        suffix = next((s for s in kind.tensors if entry.name.endswith(f".{s}")), None)
        key = entry.name.removeprefix("base_model.")
        if key in kind.shared:
            shared[key] = entry
        else:
            assert suffix is not None, entry.name
            module = entry.name.removeprefix(PREFIX).removesuffix(f".{suffix}")
            modules.setdefault(module, {})[suffix] = entry
    return [d for m, tensors in modules.items() for d in kind.read(Trained(m, tensors, config, shared))]


def merged_by_us(
    state: Mapping[str, torch.Tensor],
    found: list[Delta],
    turned: bool = False,
    wide: str = "F32",
    block: int = 5,
) -> dict[str, torch.Tensor]:
    """The base's weights with these deltas, by blocks of rows as a stream would ask for them.

    The order of BLAS's sums depends on the block: bits of what is a product are compared WHOLE.
    """
    merged = dict(state)
    placed = []
    for delta in found:
        if delta.optional and f"{delta.module}.{delta.parameter}" not in state:
            continue
        weight = state[f"{delta.module}.{delta.parameter}"]
        delta = delta.turned() if turned else delta
        assert delta.misfit(tuple(weight.shape)) is None, delta.misfit(tuple(weight.shape))
        placed.append(delta.on(tuple(weight.shape)))
    for delta in [delta.among(placed) for delta in placed]:
        name = f"{delta.module}.{delta.parameter}"
        weight = state[name]
        W = weight.reshape(delta.num_rows, -1)
        kind = torch.float64 if wide == "F64" else torch.float32
        parts = []
        with delta.open("cpu", wide, 1.0, lambda start, stop, W=W: W[start:stop]) as rows:  # type: ignore[misc]
            step = -(-block // delta.grain) * delta.grain  # an odd number of blocks, the last one smaller
            for start in range(0, delta.num_rows, step):
                stop = min(start + step, delta.num_rows)
                part = rows(start, stop, W[start:stop])
                parts.append(part if delta.replaces else W[start:stop].to(kind) + part)
        merged[name] = round_to(torch.cat(parts), NAMES[weight.dtype]).view(weight.shape)
    return merged
