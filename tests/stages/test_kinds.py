"""Every kind of adapter beside LoRA through the whole pipeline, beside PEFT's own merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.ground.deltas.kinds import KINDS
from pipeline.ground.report import Status
from tests.beside_peft import merges
from tests.kind_cases import CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_verified_and_merged_as_peft_merges_it(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    has_logits = dtype == torch.float32
    found = merges(CASES[name], tmp_path, dtype, 32 if has_logits else 0)
    assert {gate.status for gate in found.report.gates} == {Status.passed}
    assert has_logits == any(gate.name == "logits" for gate in found.report.gates)
    assert found.ours.keys() == found.theirs.keys()
    assert found.changed
    assert found.apart <= found.case.beside.bound(dtype)


def test_no_kind_is_left_out() -> None:
    tried = {str(case.config().peft_type.value) for case in CASES.values()}
    assert tried | {"LORA", "TRAINABLE_TOKENS"} == KINDS.keys()
