"""One adapter merged by us and by PEFT, from the same files: what tests and benchmarks/parity.py compare.

PEFT merges twice: in the base's dtype, as a user would, and in float64, which is its own formula without
rounding.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from pipeline.ground.report import Report
from tests.models import tensors
from tests.running import merge

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
State = dict[str, torch.Tensor]


class Beside(Enum):
    """How PEFT's merge into 16 bits stands beside ours; into float32 all but the norms are the same bits."""

    bits = "bits"
    """the same bits"""
    delta_rounded = "PEFT rounds the delta too"
    """PEFT casts the delta to the base's dtype before it adds it, so it rounds twice"""
    norms = "norms"
    """norms over columns, which we sum in float64 and by blocks, PEFT in float32"""


@dataclass(frozen=True)
class Case:
    """An adapter on a small model."""

    make: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    beside: Beside = Beside.bits
    vocabulary: int | None = None
    """tokens that the embeddings were resized to before training"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """what our run is told besides"""


@dataclass(frozen=True)
class Merges:
    """What came of a case: tensors by the names that files have."""

    folder: Path
    report: Report
    base: State
    ours: State
    theirs: State
    exact: State

    @property
    def different(self) -> list[str]:
        """Weights whose values differ between PEFT and us."""
        return [name for name, value in self.theirs.items() if not torch.equal(self.ours[name], value)]

    @property
    def changed(self) -> list[str]:
        """Weights that the adapter changes."""
        return [n for n, v in self.base.items() if n in self.ours and not torch.equal(self.ours[n], v)]


def merges(case: Case, folder: Path, dtype: torch.dtype, tokens: int = 0) -> Merges:
    """Writes base and adapter below `folder` and merges them; our run is verified on that many tokens."""
    with quiet():
        write(case, folder, dtype)
        settings = {"verify": "standard", "verify_settings": {"tokens": tokens}, **case.settings}
        report = merge(folder / "base", folder / "adapter", folder / "out", **settings)
        theirs = merged_by_peft(case, folder, dtype)
        exact = merged_by_peft(case, folder, torch.float64)
    return Merges(folder, report, tensors(folder / "base"), tensors(folder / "out"), theirs, exact)


def write(case: Case, folder: Path, dtype: torch.dtype) -> None:
    """The base as transformers writes it and a random adapter for it, as PEFT writes it."""
    torch.manual_seed(0)
    write_base(case.make().to(dtype), folder / "base")
    tuned = get_peft_model(_load(case, folder / "base", dtype), case.config())
    with_noise(tuned).save_pretrained(folder / "adapter")


def with_noise(tuned: PeftModel, size: float = 0.05, seed: int = 1) -> PeftModel:
    """The adapter with noise on everything that is trained."""
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += (torch.randn(parameter.shape) * size).to(parameter.dtype)
    return tuned


def write_base(model: nn.Module, folder: Path) -> Path:
    """A checkpoint folder of it; one that is no model of transformers is of no model type."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        return folder
    folder.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(getattr(model, "config", {})))
    return folder


def load_base(made: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """What stands in the folder as a model like `made`."""
    if isinstance(made, PreTrainedModel):
        loaded: nn.Module = type(made).from_pretrained(folder, dtype=dtype)
        return loaded
    made.load_state_dict(tensors(folder))
    return made.to(dtype)


def _load(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    model: Any = load_base(case.make(), folder, dtype)
    if case.vocabulary:
        torch.manual_seed(2)
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
    return model


def merged_by_peft(case: Case, folder: Path, dtype: torch.dtype, **options: Any) -> State:
    """What PEFT's default merge gives, by the names of the files that it would be saved to."""
    model = PeftModel.from_pretrained(_load(case, folder / "base", dtype), str(folder / "adapter"))
    merged: Any = model.merge_and_unload(**options)
    if not isinstance(merged, PreTrainedModel):
        return {name: value.detach() for name, value in merged.state_dict().items()}
    target = folder / f"peft-{NAMES[dtype]}"
    merged.save_pretrained(target)
    return tensors(target)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the libraries and the run say off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield
