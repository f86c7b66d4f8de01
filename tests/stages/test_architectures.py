"""LoRA on many architectures, saved by PEFT, merged onto the files that transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.ground.report import Status
from tests.architectures import ARCHITECTURES, write, write_merged_by_peft
from tests.models import tensors
from tests.running import merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_merge_to_what_peft_and_transformers_write(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Equal bits, but for experts over a bfloat16 base: PEFT rounds their delta to bfloat16 first.

    Those are held against float64 by the rounding gate, within half a unit.
    """
    architecture = ARCHITECTURES[name]
    write(architecture, tmp_path, dtype)
    write_merged_by_peft(architecture, tmp_path, dtype)
    few = {"tokens": 32}
    report = merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="standard", verify_settings=few
    )
    ours, peft, base = (tensors(tmp_path / folder) for folder in ("out", "peft", "base"))
    assert ours.keys() == peft.keys() == base.keys()
    differing = {key for key in ours if not torch.equal(ours[key], peft[key])}
    if dtype is torch.float32:
        assert not differing
    routers = {key for key in differing if key.endswith((".gate.weight", ".router.weight"))}
    assert all(".experts." in key for key in differing - routers)
    assert {gate.status for gate in report.gates} == {Status.passed}
    changed = [key for key in ours if not torch.equal(ours[key], base[key])]
    assert len(changed) >= len([w for w in report.plan.weights if w.deltas])
