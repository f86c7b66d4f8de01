"""Merged weights recomputed in float64, and how far what is stored is from that.

For plain LoRA on a second path - safetensors' own reader, the plain formula - which shares nothing with
what wrote the weights but the decoding of the base's rows. For every other kind with the kind's own rows
in float64; the tests hold those against PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground.rounding import ulp
from pipeline.ground.shards import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 4  # row ranges looked at in each weight
_SAMPLE_ELEMENTS = 1 << 16
ULP_BINS = 12  # ten of 0.05 of a unit in the last place, up to one unit, and beyond
MORE_NOISE = 1.1  # what a sum of squares may gain where a scale came out one unit otherwise
SLACK = 2.0**-21  # of |W| + s |B| |A|, elementwise: what a float32 sum may be off by


def sampled_rows(name: str, num_rows: int, num_columns: int, grain: int) -> list[tuple[int, int]]:
    """Row ranges to look at, spread over the weight, other ones for other names; all rows of a small one."""
    rows = max(_SAMPLE_ELEMENTS // max(num_columns, 1) // grain, 1) * grain
    if rows * _SAMPLES >= num_rows:
        return [(0, num_rows)]
    seed = int.from_bytes(sha256(name.encode()).digest()[:4], "little")
    stride = num_rows // _SAMPLES
    room = max((stride - rows) // grain, 0) + 1
    starts = [(part * stride // grain + (seed >> part) % room) * grain for part in range(_SAMPLES)]
    return [(start, min(start + rows, num_rows)) for start in starts if start < num_rows]


@dataclass
class Facts:
    """What the samples of one weight showed, against the float64 recomputation."""

    elements: int = 0
    worst_ulp: float = 0.0  # |stored - reference| in units of the last place, less the slack
    worst_raw_ulp: float = 0.0  # with it: large where weight and delta nearly cancel
    ulps: list[int] = field(default_factory=lambda: [0] * ULP_BINS)  # elements by their distance, with it
    beyond: int = 0  # elements farther off than half a unit and the slack
    changed: int = 0
    not_finite: int = 0
    kept: float = 0.0  # <O - W, D>
    energy: float = 0.0  # <D, D>
    coded: bool = False  # held as codes: no units in the last place, but noise
    noise: float = 0.0  # <O - T, O - T>
    least_noise: float = 0.0  # the same of the codes that should stand there

    @property
    def is_noisy(self) -> bool:
        """Whether codes are farther off in sum than they should be; some turn with a bit of their scale."""
        return self.noise > MORE_NOISE * self.least_noise + (SLACK * SLACK) * self.energy

    def as_dict(self) -> dict[str, Any]:
        units = {"worst_ulp": self.worst_ulp, "worst_raw_ulp": self.worst_raw_ulp, "ulps": self.ulps}
        noise = {"verified_noise": (self.noise / self.energy) ** 0.5 if self.energy else None}
        return {
            "verified_elements": self.elements,
            **(noise if self.coded else units),
            "verified_retained": self.kept / self.energy if self.energy else None,
            "verified_changed_fraction": self.changed / self.elements if self.elements else 0.0,
        }


class Reference:
    """An adapter folder read with the safetensors library: float64 rows of what LoRA adds to a module."""

    def __init__(self, adapter: Path, config: Mapping[str, Any]) -> None:
        self._path, self._config = adapter / "adapter_model.safetensors", config
        self._stack = ExitStack()

    def __enter__(self) -> Reference:
        from safetensors import safe_open

        self._file = self._stack.enter_context(safe_open(self._path, "pt"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def delta(self, module: str, factor: float, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of the delta, and of |factor * scale| |B| |A|, from which the slack is taken."""
        A = self._file.get_tensor(factor_name(module, "A")).double()
        B = self._file.get_slice(factor_name(module, "B"))[start:stop].double()
        scale = self._scale(module, A.shape[0]) * factor
        return scale * (B @ A), abs(scale) * (B.abs() @ A.abs())

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._config["lora_alpha"]
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha / rank**0.5 if self._config.get("use_rslora") else alpha / rank)


def factor_name(module: str, x: str) -> str:
    """The key under which PEFT keeps a plain layer's lora_A or lora_B."""
    return f"base_model.model.{module}.lora_{x}.weight"


def size_of_terms(base: Tensor, delta: Tensor) -> Tensor:
    """What stands for |B| |A| for a kind without such a product: the norms of the rows it sums over."""
    W = base.double()
    return (W.norm(dim=1, keepdim=True) + delta.norm(dim=1, keepdim=True)).expand(W.shape)


def compare(
    facts: Facts,
    stored: Tensor,
    dtype: str,
    base: Tensor,
    rounded: Tensor,
    delta: Tensor,
    size: Tensor,
    by_chance: bool = False,
) -> None:
    """Adds one sample to the facts: stored rows against base + delta.

    All are `(rows, columns)`; `rounded` is the base in the stored dtype, `delta` and `size` are float64,
    `size` what the slack is taken of beside |W|. Rounded by chance, a whole unit is right, else half of one.
    """
    W, O = base.double(), stored.double()  # noqa: E741
    target = W + delta
    error, unit, slack = (O - target).abs(), ulp(target, dtype), SLACK * (W.abs() + size)
    facts.elements += stored.numel()
    facts.worst_ulp = max(facts.worst_ulp, _most((error - slack) / unit))
    facts.worst_raw_ulp = max(facts.worst_raw_ulp, _most(error / unit))
    facts.ulps = [a + b for a, b in zip(facts.ulps, _bins(error / unit), strict=True)]
    facts.beyond += int((~(error <= (unit if by_chance else unit / 2) + slack)).sum())
    facts.changed += int((stored != rounded).sum())
    facts.not_finite += int((~stored.isfinite()).sum())
    facts.kept += float(((O - W) * delta).sum())
    facts.energy += float((delta * delta).sum())


def _bins(ulps: Tensor) -> list[int]:
    """How many elements lie in each of the bins."""
    import torch

    near = ulps.nan_to_num(nan=2.0).clamp(max=2.0).flatten()
    numbers = torch.where(near <= 0.5, (near * 20).ceil().sub_(1).clamp_(min=0), 10 + (near > 1).double())
    found: list[int] = torch.bincount(numbers.long(), minlength=ULP_BINS).tolist()
    return found


def _most(values: Tensor) -> float:
    return float(values.nan_to_num(nan=float("inf")).max())


@dataclass
class Folder:
    """The tensors of a written checkpoint, found and read with the safetensors library."""

    path: Path
    shards: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        from safetensors import safe_open

        found: dict[str, str] = {}
        for shard in read_checkpoint(self.path):  # the files that a loader reads, not others beside them
            with safe_open(shard.file.path, "pt") as file:
                found |= dict.fromkeys(file.keys(), shard.file.path.name)
        self.shards = found

    def facts(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor."""
        from safetensors import safe_open

        for shard in sorted(set(self.shards.values())):
            with safe_open(self.path / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    part = file.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a matrix, in its stored dtype; all of any other tensor, as such rows."""
        from safetensors import safe_open

        with safe_open(self.path / self.shards[name], "pt") as file:
            part = file.get_slice(name)
            if len(part.get_shape()) == 2:
                found: Tensor = part[start:stop]
                return found
            whole: Tensor = file.get_tensor(name)
        return whole.view(-1, max(whole.shape[-1] if whole.dim() > 1 else whole.numel(), 1))[start:stop]
