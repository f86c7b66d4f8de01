"""What the tests of every adapter kind claim, told once: bits, cuts of rows, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from pipeline.ground.deltas.delta import Delta
from pipeline.ground.deltas.kind import Kind
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.errors import Refused
from pipeline.ground.rounding import round_to
from tests.ground.deltas.parity import PREFIX, deltas, merged_by_peft, merged_by_us, write_adapter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

State = dict[str, torch.Tensor]
Make = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Merges:
    """A base's weights, the deltas of a random adapter on it, and what we and PEFT make of both."""

    base: State
    deltas: list[Delta]
    ours: State
    theirs: State
    folder: Path

    @property
    def different(self) -> list[str]:
        """Weights whose bits differ."""
        return [name for name in self.theirs if not torch.equal(self.ours[name], self.theirs[name])]

    @property
    def unmoved(self) -> list[str]:
        """Weights that PEFT's merge left as they were."""
        return [name for name in self.theirs if torch.equal(self.base[name], self.theirs[name])]

    def adapter(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """A tensor of the adapter's file."""
        key = name if name.startswith(PREFIX) else f"{PREFIX}{name}"
        return load_file(self.folder / WEIGHTS)[key].to(dtype)


def model(make: Make, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same random model every time, its biases too."""
    torch.manual_seed(0)
    made = make()
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return made.to(dtype)


def merges(
    folder: Path,
    kind: Kind,
    make: Make,
    config: PeftConfig,
    dtype: torch.dtype = torch.float32,
    turned: bool = False,
    block: int = 5,
) -> Merges:
    """A random adapter of this config, written by PEFT, merged by both."""
    write_adapter(folder, model(make, dtype), config)
    base = {name: weight.clone() for name, weight in model(make, dtype).state_dict().items()}
    found = deltas(folder, kind)
    theirs = merged_by_peft(model(make, dtype), folder)
    return Merges(base, found, merged_by_us(base, found, turned, block=block), theirs, folder)


def wide_rows(delta: Delta, weight: torch.Tensor) -> torch.Tensor:
    """All rows in float64, shaped as the weight."""
    return _rows(delta.on(tuple(weight.shape)), weight, weight.numel()).view(weight.shape)


def does_not_depend_on_cuts(delta: Delta, weight: torch.Tensor) -> bool:
    """Whether rows by any blocks are those of the whole, in float64 up to what float32 shows."""
    delta = delta.on(tuple(weight.shape))
    whole = round_to(_rows(delta, weight, delta.num_rows), "F32")
    steps = {step * delta.grain for step in (1, 2, 3, 7)}
    return all(torch.equal(round_to(_rows(delta, weight, step), "F32"), whole) for step in steps)


def turns(delta: Delta, weight: torch.Tensor) -> bool:
    """Whether the rows for a weight that lies transposed are those of the weight, transposed."""
    lying, straight = wide_rows(delta.turned(), weight.T.contiguous()), wide_rows(delta, weight)
    return torch.equal(round_to(lying, "F32"), round_to(straight, "F32").T)


def _rows(delta: Delta, weight: torch.Tensor, step: int, dtype: str = "F64") -> torch.Tensor:
    W = weight.reshape(delta.num_rows, -1)
    cuts = [*range(0, len(W), step), len(W)]
    with delta.open("cpu", dtype, 1.0, lambda start, stop: W[start:stop]) as rows:
        parts = [rows(start, stop, W[start:stop]) for start, stop in pairwise(cuts)]
    assert all(part.dtype == torch_dtype(dtype) for part in parts)
    return torch.cat(parts)


def rewrite(
    folder: Path,
    drop: Iterable[str] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> None:
    """Drops or replaces tensors and fields of an adapter folder."""
    stored = load_file(folder / WEIGHTS)
    stored = {name: value for name, value in stored.items() if not name.endswith(tuple(drop))}
    stored.update({f"{PREFIX}{name}": value.contiguous() for name, value in (tensors or {}).items()})
    save_file(stored, folder / WEIGHTS)
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, **config}))


def refusal(folder: Path, kind: Kind, **changes: Any) -> str:
    """The sentence for an adapter folder that was rewritten so."""
    rewrite(folder, **changes)
    with pytest.raises(Refused) as refused:
        deltas(folder, kind)
    return str(refused.value)
