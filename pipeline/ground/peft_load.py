"""Whether PEFT itself takes an adapter folder: loaded onto the model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.ground.libraries import quiet
from pipeline.ground.logits import CannotCompare
from pipeline.ground.model_modules import empty_model


def unplaced(config: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """The keys that PEFT misses in the file, and those it does not expect; CannotCompare without a model."""
    model = empty_model(config)
    if model is None:
        raise CannotCompare(f"transformers makes no model of model_type {config.get('model_type')!r}")
    with quiet():
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True)
            result = loaded.load_adapter(str(folder), "default", low_cpu_mem_usage=True)
        except Exception as error:  # whatever PEFT raises about a file that it does not take
            return [f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"], []
    return list(result.missing_keys), list(result.unexpected_keys)
