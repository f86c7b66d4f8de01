"""One adapter merged by us and by PEFT, from the same files: what tests and benchmarks/parity.py compare.

PEFT merges twice: in the base's dtype, as a user would, and in float64, which is its own formula without
rounding.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from pipeline.ground.report import Report
from tests.models import tensors
from tests.running import merge
from tests.tolerance import (
    OTHER_ORDER_ULPS,
    ROUNDED_DELTA_ULPS,
    TIPPED_ULPS,
    num_different,
    ulps_apart,
    within_half_ulp,
)

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
State = dict[str, torch.Tensor]
gc.freeze()  # the libraries stay: what verification collects between two models is then quickly found


class Beside(Enum):
    """How far PEFT's merge may be from ours, in units of the last place: into float32, into 16 bits."""

    bits = (0.0, 0.0)
    """the same bits"""
    delta_rounded = (0.0, ROUNDED_DELTA_ULPS)
    """PEFT casts the delta to the base's dtype before it adds it, so it rounds twice"""
    order = (OTHER_ORDER_ULPS, TIPPED_ULPS)
    """a float32 sum of another order: column norms, which we take by blocks in float64; convolutions"""

    loose = (float("inf"), ROUNDED_DELTA_ULPS)
    """long float32 computations (Fourier transforms, reflections); tests/ground/deltas bounds each kind's"""

    def bound(self, dtype: torch.dtype) -> float:
        return self.value[0 if dtype == torch.float32 else 1]


@dataclass(frozen=True)
class Case:
    """An adapter on a small model."""

    make: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    beside: Beside = Beside.bits
    vocabulary: int | None = None
    """tokens that the embeddings were resized to before training"""
    told: Mapping[str, Any] = field(default_factory=dict)
    """settings of extract that our run has"""
    told_first: bool = False
    """whether it is given the adapter as it was before training"""
    rewrite: Callable[[Path], None] = lambda folder: None
    """what another writer than PEFT 0.21 would have done: changes the folder that has base and adapter"""


@dataclass(frozen=True)
class Merges:
    """What came of a case: tensors by the names that files have."""

    case: Case
    folder: Path
    dtype: str
    report: Report
    base: State
    adapter: State
    ours: State
    theirs: State

    @cached_property
    def exact(self) -> State:
        """PEFT's merge in float64."""
        with quiet():
            return merged_by_peft(self.case, self.folder, torch.float64)

    @property
    def peft_folder(self) -> str:
        """Where PEFT's merge in the base's dtype was saved, for models of transformers."""
        return f"peft-{self.dtype}"

    @property
    def different(self) -> list[str]:
        """Weights whose values differ between PEFT and us."""
        return [name for name, value in self.theirs.items() if num_different(self.ours[name], value)]

    @property
    def changed(self) -> list[str]:
        """Weights of the base that are not what they were."""
        return [
            name
            for name, value in self.base.items()
            if self.ours[name].shape != value.shape or num_different(self.ours[name], value)
        ]

    @property
    def apart(self) -> float:
        """The largest difference between PEFT and us, in units of the last place of what is summed."""
        return max(
            (self._apart(n, self.ours[n], self.theirs[n], self.exact[n]) for n in self.different), default=0.0
        )

    @property
    def num_different(self) -> int:
        """Elements in which PEFT and we differ."""
        return sum(num_different(self.ours[name], self.theirs[name]) for name in self.different)

    def away(self, state: State, exact: State) -> float:
        """The largest distance from float64 weights, in the same units."""
        return max(self._apart(name, state[name], value, value) for name, value in exact.items())

    def missed(self, state: State, exact: State) -> float:
        """The distance from float64 weights as a share of what the adapter should change, by their norms."""
        off = sum(float((state[name].double() - value).square().sum()) for name, value in exact.items())
        meant = sum(float((value - self._before(n, value)).square().sum()) for n, value in exact.items())
        return float((off / meant) ** 0.5)

    def _apart(self, name: str, one: torch.Tensor, other: torch.Tensor, exact: torch.Tensor) -> float:
        W = self._before(name, exact)
        size = torch.stack([W.abs(), exact.abs(), (exact - W).abs()]).amax(0)
        return ulps_apart(one, other, size, self.dtype)

    def off(self, state: State, exact: State | None = None) -> list[str]:
        """Weights that are not the float64 merge rounded once, after a float32 sum."""
        return [
            name
            for name, value in (exact or self.exact).items()
            if not within_half_ulp(state[name], value.double(), self.dtype, self._terms(name, value.double()))
        ]

    def _terms(self, name: str, exact: torch.Tensor) -> torch.Tensor:
        """|W| and the norm of the delta's row, which stands for |B| |A|."""
        W = self._before(name, exact)
        norms = (exact - W).flatten(1 if W.dim() > 1 else 0).norm(dim=-1)
        return W.abs() + norms.view(-1, *[1] * (W.dim() - 1))

    def _before(self, name: str, exact: torch.Tensor) -> torch.Tensor:
        """What a delta is added to: the base's weight, or the one that the adapter holds; else the result."""
        held = self.adapter.get(f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight")
        shared = self.base.get("model.embed_tokens.weight") if name == "lm_head.weight" else None
        before = self.base.get(name, shared) if held is None else held
        return exact if before is None or before.shape != exact.shape else before.double()


def merges(case: Case, folder: Path, dtype: torch.dtype, tokens: int = 0) -> Merges:
    """Writes base and adapter below `folder` and merges them; our run is verified on that many tokens."""
    with quiet():
        write(case, folder, dtype)
        report = merge(
            folder / "base",
            folder / "adapter",
            folder / "out",
            verify="standard",
            verify_settings={"tokens": tokens},
            expect={**case.told, **({"initial": str(folder / "first")} if case.told_first else {})},
        )
        theirs = merged_by_peft(case, folder, dtype)
    base, adapter, ours = (tensors(folder / name) for name in ("base", "adapter", "out"))
    return Merges(case, folder, NAMES[dtype], report, base, adapter, ours, theirs)


def write(case: Case, folder: Path, dtype: torch.dtype) -> None:
    """The base as transformers writes it and a random adapter for it, as PEFT writes it."""
    torch.manual_seed(0)
    write_base(case.make().to(dtype), folder / "base")
    tuned = get_peft_model(load_base(case, folder / "base", dtype), case.config())
    tuned.save_pretrained(folder / "first")
    with_noise(tuned).save_pretrained(folder / "adapter")
    case.rewrite(folder)


def with_noise(tuned: PeftModel, size: float = 0.05, seed: int = 1) -> PeftModel:
    """The adapter with noise on everything that is trained."""
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += (torch.randn(parameter.shape) * size).to(parameter.dtype)
    return tuned


def write_base(model: nn.Module, folder: Path, **options: Any) -> Path:
    """A checkpoint folder of it; one that is no model of transformers is of the type that it says."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, **options)
        return folder
    folder.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(getattr(model, "config", {})))
    return folder


def load_base(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    """The base of a folder as it was when the adapter was made for it: with as many tokens."""
    made = case.make()
    if not isinstance(made, PreTrainedModel):
        made.load_state_dict(tensors(folder))
        return made.to(dtype)
    model: Any = type(made).from_pretrained(folder, dtype=dtype)
    if case.vocabulary:
        torch.manual_seed(2)
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
    return model


def loaded_by_peft(case: Case, folder: Path, dtype: torch.dtype) -> PeftModel:
    """Base and adapter as PEFT loads them, unmerged."""
    config = PeftConfig.from_pretrained(str(folder / "adapter"))
    if dtype == torch.float64 and hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # some refuse float64; the file holds what they made
    model = load_base(case, folder / "base", dtype)
    return PeftModel.from_pretrained(model, str(folder / "adapter"), config=config)


def merged_by_peft(case: Case, folder: Path, dtype: torch.dtype) -> State:
    """What PEFT's default merge gives, by the names of the files that it would be saved to."""
    merged: Any = loaded_by_peft(case, folder, dtype).merge_and_unload()
    if not isinstance(merged, PreTrainedModel):
        return {name: value.detach() for name, value in merged.state_dict().items()}
    target = folder / f"peft-{NAMES[dtype]}"
    merged.save_pretrained(target)
    return tensors(target)


def modules_of(base: Path, pattern: str) -> Iterator[str]:
    """Modules with a matrix, by the names of the base's files."""
    for name, weight in tensors(base).items():
        if weight.dim() == 2 and re.fullmatch(pattern, module := name.removesuffix(".weight")):
            yield module


def written_by_file_names(pattern: str, **config: Any) -> Callable[[Path], None]:
    """Writes an adapter as PEFT before transformers 5 did: its modules are those of the files."""

    def write(folder: Path) -> None:
        torch.manual_seed(3)
        base, lora_tensors = tensors(folder / "base"), {}
        for module in modules_of(folder / "base", pattern):
            out_features, in_features = base[f"{module}.weight"].shape
            for x, shape in (("A", (4, in_features)), ("B", (out_features, 4))):
                lora_tensors[f"base_model.model.{module}.lora_{x}.weight"] = torch.randn(shape) * 0.05
        save_file(lora_tensors, folder / "adapter" / WEIGHTS, {"format": "pt"})
        told = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", inference_mode=True, **config)
        told.save_pretrained(folder / "adapter")

    return write


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the libraries and the run say off the terminal.

    Draws no report.html, which takes a second, and computes in one thread: tiny matrices only wait for more.
    """
    said, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch("pipeline.door.report_page", lambda *_: ""),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def quietly_merged(*arguments: Any, **settings: Any) -> Report:
    """tests.running.merge, quietly."""
    with quiet():
        return merge(*arguments, **settings)
