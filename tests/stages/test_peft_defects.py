"""What PEFT 0.21.2 merges wrongly: ours is the formula in float64, rounded once, and PEFT's is not.

Where a test fails because PEFT's result has become right, its defect is mended upstream: move the case to
tests/lora_cases.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.ground.report import Status
from tests.beside_peft import Merges, merges, quiet, quietly_merged, write
from tests.models import tensors
from tests.peft_defects import DEFECTS, Files, by_file_names
from tests.tolerance import FLOAT32_SUM

DTYPES = (torch.float32, torch.bfloat16)
SIDES = ("model.embed_tokens.weight", "lm_head.weight")
# Those that PEFT itself runs otherwise than trained, so that no logits can be compared with it.
NO_REFERENCE = {
    "mixtral, experts by file names, rslora": "scales single experts by sqrt(2)",
    "qwen2_moe, experts by file names": "PEFT itself does not take",
    "qwen2_5_vl, names of before transformers 5": "PEFT itself does not take",
    "pissa_niter": "draws the init of this adapter again",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", DEFECTS)
def test_the_merge_is_float64s_where_pefts_is_not(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    defect = DEFECTS[name]
    has_logits = dtype == torch.float32 and isinstance(defect.case.make(), PreTrainedModel)
    found = merges(defect.case, tmp_path, dtype, 32 if has_logits else 0)
    right = defect.right(tmp_path)
    assert found.off(found.ours, right) == []
    untouched = found.base.keys() - right.keys()
    assert all(torch.equal(found.ours[n], found.base[n]) for n in untouched)
    assert found.ours.keys() == found.base.keys() | right.keys()
    is_right = defect.only_16_bits and dtype == torch.float32
    assert (found.off(in_both(found), right) == []) == is_right
    assert status_of_logits(found) == expected_status(name, has_logits)
    told = [finding.text for finding in found.report.findings if NO_REFERENCE.get(name, "\0") in finding.text]
    assert bool(told) == (has_logits and name in NO_REFERENCE)


def in_both(found: Merges) -> dict[str, torch.Tensor]:
    """PEFT's weights, lm_head being the embeddings where they are still tied."""
    return {SIDES[1]: found.theirs.get(SIDES[0], torch.zeros(0)), **found.theirs}


def status_of_logits(found: Merges) -> Status | None:
    assert found.report.passed
    return next((gate.status for gate in found.report.gates if gate.name == "logits"), None)


def expected_status(name: str, has_logits: bool) -> Status | None:
    if not has_logits:
        return None
    return Status.skipped if name in NO_REFERENCE else Status.passed


def test_a_tied_adapter_is_added_twice_by_peft(tmp_path: Path) -> None:
    found = merges(DEFECTS["tied, as one"].case, tmp_path, torch.float32)
    name = SIDES[0]
    once = DEFECTS["tied, as one"].right(tmp_path)[name] - found.base[name].double()
    assert ratio(found.theirs[name] - found.base[name], once) == pytest.approx(2, rel=FLOAT32_SUM)
    assert "lm_head.weight" not in found.ours
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_the_out_proj_of_attention_is_added_as_often_as_told(tmp_path: Path) -> None:
    """Twice is PEFT 0.21.2, in its merge as in its forward pass."""
    case = DEFECTS["out_proj of attention"].case
    once = merges(case, tmp_path / "once", torch.float32)
    twice = merges(replace(case, told={"out_proj_times": 2}), tmp_path / "twice", torch.float32)
    name = "attn.out_proj.weight"
    step = once.ours[name] - once.base[name]
    assert ratio(once.theirs[name] - once.base[name], step) == pytest.approx(2, rel=FLOAT32_SUM)
    assert ratio(twice.ours[name] - twice.base[name], step) == pytest.approx(2, rel=FLOAT32_SUM)


def test_fused_experts_are_scaled_too_much_by_peft_with_rslora(tmp_path: Path) -> None:
    name = "mixtral, experts by file names, rslora"
    found = merges(DEFECTS[name].case, tmp_path, torch.float32)
    for weight, right in DEFECTS[name].right(tmp_path).items():
        too_much = sqrt(2) if weight.endswith(("w1.weight", "w3.weight")) else 1
        step = right - found.base[weight].double()
        theirs = ratio(found.theirs[weight] - found.base[weight], step)
        assert theirs == pytest.approx(too_much, rel=FLOAT32_SUM), weight


@pytest.mark.parametrize(
    ("name", "modules", "count"),
    [
        ("qwen2_moe, experts by file names", r".*\.mlp\.experts\.\d+\..*_proj", 12),
        ("qwen2_5_vl, names of before transformers 5", r".*\.(q_proj|o_proj|up_proj|qkv)", 10),
    ],
)
def test_adapters_that_peft_drops_leave_its_model_as_it_was(
    name: str, modules: str, count: int, tmp_path: Path
) -> None:
    found = merges(DEFECTS[name].case, tmp_path, torch.float32)
    right = by_file_names(modules)(tmp_path)
    assert len(right) == count
    assert all(torch.equal(found.theirs[n], found.base[n]) for n in right)
    assert not any(torch.equal(found.ours[n], found.base[n]) for n in right)


def test_old_square_experts_are_merged_by_peft_as_new_ones(tmp_path: Path) -> None:
    """The same tensors, said to be of either version: PEFT makes no difference, we do."""
    old = merges(DEFECTS["square experts of PEFT 0.18"].case, tmp_path / "old", torch.float32)
    new = replace(DEFECTS["square experts of PEFT 0.18"].case, rewrite=lambda folder: None)
    fresh = merges(new, tmp_path / "new", torch.float32)
    name = "experts.gate_up_proj"
    assert torch.equal(old.theirs[name], fresh.theirs[name])
    assert torch.equal(fresh.ours[name], fresh.theirs[name])
    assert not torch.equal(old.ours[name], fresh.ours[name])


def test_what_an_init_took_is_taken_from_the_adapter_before_training_not_from_a_draw(tmp_path: Path) -> None:
    with quiet():
        write(DEFECTS["pissa_niter"].case, tmp_path, torch.float32)
    told = {"initial": str(tmp_path / "adapter")}  # as if nothing had been learnt
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", expect=told)
    base, ours, files = tensors(tmp_path / "base"), tensors(tmp_path / "out"), Files(tmp_path)
    assert float(files.lora("model.layers.0.self_attn.q_proj").abs().max()) > 0
    assert all(float((ours[n] - base[n]).abs().max()) <= float(base[n].abs().max()) * 2**-20 for n in base)


def ratio(one: torch.Tensor, other: torch.Tensor) -> float:
    """How many times `other` the one is, by least squares."""
    return float((one.double() * other.double()).sum() / (other.double() ** 2).sum())
