"""Every field that PEFT writes for these kinds is one that we account for."""

from __future__ import annotations

from dataclasses import fields

import peft
import pytest

from pipeline.ground.deltas import (
    adalora,
    c3a,
    fourierft,
    ln_tuning,
    loha,
    lokr,
    randlora,
    vblora,
    vera,
)
from pipeline.ground.deltas.kind import Kind

COMMON = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
}
CONFIGS = {
    peft.AdaLoraConfig: adalora.KIND,
    peft.C3AConfig: c3a.KIND,
    peft.FourierFTConfig: fourierft.KIND,
    peft.LNTuningConfig: ln_tuning.KIND,
    peft.LoHaConfig: loha.KIND,
    peft.LoKrConfig: lokr.KIND,
    peft.RandLoraConfig: randlora.KIND,
    peft.VBLoRAConfig: vblora.KIND,
    peft.VeraConfig: vera.KIND,
}


@pytest.mark.parametrize("config", CONFIGS)
def test_no_field_of_a_config_is_unknown(config: type[peft.PeftConfig]) -> None:
    kind: Kind = CONFIGS[config]
    known = COMMON | kind.fields | set(kind.refused)
    assert {field.name for field in fields(config)} <= known
    assert not kind.fields & (COMMON | set(kind.refused))
