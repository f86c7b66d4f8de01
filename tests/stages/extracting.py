"""Extractions in this process, and whether PEFT makes of base and adapter what the fine-tune is."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from pipeline import stage
from pipeline.door import Request, fulfil
from pipeline.extraction.choice import Rest
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.ranks import Energy
from pipeline.ground.report import Report
from tests.beside_peft import quiet
from tests.running import chosen
from tests.tolerance import FLOAT32_FORWARD

ALL = Energy(1 - 1e-9)  # every singular value there is


def extraction(
    base: Path,
    tuned: Path | None,
    output: Path,
    *,
    save: str = "adapter",
    save_settings: Mapping[str, Any] | None = None,
    verify: str = "structure",
    verify_settings: Mapping[str, Any] | None = None,
    adapter: Any = None,
    dry_run: bool = False,
    **settings: Any,
) -> stage.Pipeline:
    """The pipeline that the command line would build."""
    stages: Any = stage.STAGES
    settings = {"rank": 4, "rest": Rest.save, **settings}
    load = "gguf" if base.suffix == ".gguf" else "safetensors"
    return stage.Pipeline(
        extract=stages["extract"]["svd"](
            adapter=chosen(adapter) if adapter else (),
            base_model=str(base),
            finetune=str(tuned) if tuned else None,
            output=output,
            dry_run=dry_run,
            **settings,
        ),
        load=stages["load"][load](base_model=str(base)),
        dequantize=stages["dequantize"]["auto"](),
        merge=stages["merge"]["exact"](merge_dtype=FloatDtype.float32, names={}),
        save=stages["save"][save](output=output, device="cpu", **(save_settings or {})),
        verify=stages["verify"][verify](device="cpu", **(verify_settings or {})),
    )


def extract(base: Path, tuned: Path | None, output: Path, **settings: Any) -> Report:
    """Runs and publishes."""
    report = fulfil(Request(extraction(base, tuned, output, **settings), {}))
    assert report is not None
    return report


def config_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json."""
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def noisy(model: nn.Module, changes: Callable[[str], bool] = lambda name: True, size: float = 0.05) -> None:
    """Puts noise on the parameters that `changes` names: a fine-tune."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if changes(name):
            parameter.data += size * torch.randn_like(parameter)


def answer(model: Any) -> torch.Tensor:
    """The first thing that a model says to whatever it takes: text, sound or images."""
    wanted, random = inspect.signature(model.forward).parameters, torch.Generator().manual_seed(0)
    tokens = torch.arange(1, 25)[None]
    told: dict[str, torch.Tensor] = {}
    if "input_ids" in wanted:
        told["input_ids"] = tokens
    elif "pixel_values" in wanted:
        told["pixel_values"] = torch.randn(1, 3, 32, 32, generator=random)
    elif "input_features" in wanted:
        told["input_features"] = torch.randn(1, 8, 32, generator=random)
    else:
        told["input_values"] = torch.randn(1, 400, generator=random)
    if "decoder_input_ids" in wanted:
        told["decoder_input_ids"] = tokens[:, :8]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**told)[0]
    return found.float()


def loaded(model: nn.Module, adapter: Path) -> PeftModel:
    """The base with the adapter, as PEFT loads it; of which every key must find its place."""
    found = PeftModel.from_pretrained(model, str(adapter))
    again = found.load_adapter(str(adapter), "default")
    assert (again.missing_keys, again.unexpected_keys) == ([], [])
    return found


def answers_as(base: nn.Module, adapter: Path, tuned: nn.Module) -> None:
    """Asserts that base + adapter, as PEFT runs them, answer as the fine-tune does."""
    with quiet():
        before, wanted = answer(base), answer(tuned)
        found = answer(loaded(base, adapter).base_model.model)
    moved = (wanted[..., : before.shape[-1]] - before).abs().max()
    assert float((found - wanted).abs().max()) < FLOAT32_FORWARD * float(moved)
