"""A run in this process, without Hydra: stages by name, settings as keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import stage
from pipeline.door import Request, fulfil
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.report import Report
from pipeline.stages.save.merged import SaveDtype

stage.load_stages()


def pipeline(
    base: Path,
    adapter: Path | dict[Path, float],
    output: Path,
    *,
    save: str = "merged",
    verify: str = "none",
    dequantize: str = "auto",
    method: str = "exact",
    merge_dtype: str = "float32",
    dtype: str = "keep",
    weight: float = 1.0,
    device: str = "cpu",
    names: dict[str, str] | None = None,
    expect: dict[str, Any] | None = None,
    verify_settings: dict[str, Any] | None = None,
    method_settings: dict[str, Any] | None = None,
    dequantize_settings: dict[str, Any] | None = None,
    **save_settings: Any,
) -> stage.Pipeline:
    """A pipeline as the command line would build it."""
    stages: Any = stage.STAGES
    load = "gguf" if base.suffix == ".gguf" else "safetensors"
    own = {"dtype": SaveDtype[dtype]} if save in ("merged", "both", "none") else {}
    return stage.Pipeline(
        extract=stages["extract"]["peft"](adapter=chosen(adapter), **(expect or {})),
        load=stages["load"][load](base_model=str(base)),
        dequantize=stages["dequantize"][dequantize](**(dequantize_settings or {})),
        merge=stages["merge"][method](
            merge_dtype=FloatDtype[merge_dtype], weight=weight, names=names or {}, **(method_settings or {})
        ),
        save=stages["save"][save](output=output, device=device, **own, **save_settings),
        verify=stages["verify"][verify](device=device, **(verify_settings or {})),
    )


def chosen(adapter: Path | dict[Path, float]) -> tuple[stage.Chosen, ...]:
    """One adapter, or several with their weights, as the request names them."""
    several = adapter if isinstance(adapter, dict) else {adapter: 1.0}
    return tuple(stage.Chosen(str(path), weight) for path, weight in several.items())


def merge(base: Path, adapter: Path | dict[Path, float], output: Path, **settings: Any) -> Report:
    """Runs and publishes."""
    report = fulfil(Request(pipeline(base, adapter, output, **settings), {}))
    assert report is not None
    return report
