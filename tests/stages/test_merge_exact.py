"""Merged weights against PEFT and against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import LINEAR, exact, merged_by_peft, tensors, write_llama, write_lora
from tests.running import merge
from tests.tolerance import num_different, within_half_ulp, worst_ulp

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def modules(names: dict[str, torch.Tensor]) -> list[str]:
    return [n.removesuffix(".weight") for n in names if n.split(".")[-2] in LINEAR]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_pefts_bit_for_bit(
    tmp_path: Path, base_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    base = write_llama(tmp_path / "base", base_dtype)
    adapter = write_lora(tmp_path / "adapter", base, dtype=adapter_dtype)
    merge(base, adapter, tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), merged_by_peft(base, adapter)
    assert ours.keys() == theirs.keys()
    assert {n: num_different(ours[n], theirs[n]) for n in ours if num_different(ours[n], theirs[n])} == {}
    assert all(ours[n].dtype == theirs[n].dtype == base_dtype for n in ours)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "r": 6},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp": 2}, "alpha_pattern": {"k_proj": 3, "o_proj": 1}},
        {"rank_pattern": {"layers.0.mlp.up_proj": 3, "up_proj": 5}, "use_rslora": True},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, ".*v_proj": 1}},
        {"target_modules": ["q_proj"], "lora_alpha": 0.5},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_scaling_and_patterns_are_pefts(tmp_path: Path, config: dict[str, Any]) -> None:
    base = write_llama(tmp_path / "base", torch.float32)
    adapter = write_lora(tmp_path / "adapter", base, **config)
    merge(base, adapter, tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), merged_by_peft(base, adapter)
    before = tensors(base)
    assert any(num_different(ours[n], before[n]) for n in ours)
    assert [n for n in ours if num_different(ours[n], theirs[n])] == []


@pytest.mark.parametrize("merge_dtype", ["float32", "float64"])
@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_every_output_dtype_is_rounded_once(
    tmp_path: Path, base_dtype: torch.dtype, save_dtype: str, merge_dtype: str
) -> None:
    base = write_llama(tmp_path / "base", base_dtype)
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", dtype=save_dtype, merge_dtype=merge_dtype)
    before, after = tensors(base), tensors(tmp_path / "out")
    for module in modules(before):
        target, size = exact(before[f"{module}.weight"], adapter, module, 1.5)
        stored = after[f"{module}.weight"]
        assert stored.dtype == getattr(torch, save_dtype)
        assert within_half_ulp(stored, target, NAMES[save_dtype], size)
        if merge_dtype == "float64" and save_dtype != "float32":
            assert worst_ulp(stored, target, NAMES[save_dtype]) <= 0.5
    for name in before.keys() - {f"{m}.weight" for m in modules(before)}:
        assert torch.equal(after[name], before[name].to(getattr(torch, save_dtype)))


def test_a_float64_base_is_merged_in_float64(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float64)
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    for module in modules(before):
        target, _ = exact(before[f"{module}.weight"], adapter, module, 1.5)
        assert after[f"{module}.weight"].dtype == torch.float64
        assert worst_ulp(after[f"{module}.weight"], target, "F64") <= 4  # the order of a float64 sum


@pytest.mark.parametrize("merge_dtype", ["bfloat16", "float16"])
def test_a_narrow_merge_dtype_is_what_torch_computes(tmp_path: Path, merge_dtype: str) -> None:
    base = write_llama(tmp_path / "base", torch.bfloat16)
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", merge_dtype=merge_dtype)
    before, after, lora = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    kind = getattr(torch, merge_dtype)
    for module in modules(before):
        W = before[f"{module}.weight"]
        A, B = (lora[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        delta = ((B @ A) * 1.5).to(kind)
        assert num_different(after[f"{module}.weight"], (W.to(kind) + delta).to(torch.bfloat16)) == 0


@pytest.mark.parametrize("weight", [2.0, 0.25, -1.0])
def test_weight_scales_the_adapter(tmp_path: Path, weight: float) -> None:
    base = write_llama(tmp_path / "base", torch.float32)
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", weight=weight)
    before, after = tensors(base), tensors(tmp_path / "out")
    for module in modules(before):
        target, size = exact(before[f"{module}.weight"], adapter, module, 1.5 * weight)
        assert within_half_ulp(after[f"{module}.weight"], target, "F32", size)


def test_renames_bind_modules_of_another_name(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float32)
    adapter = write_lora(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    moved = {
        k.replace("base_model.model.model.", "base_model.model.text.backbone."): v
        for k, v in load_file(path).items()
    }
    save_file(moved, path, {"format": "pt"})
    merge(base, adapter, tmp_path / "out", names={"text.backbone": "model"})
    write_lora(tmp_path / "plain", base)
    merge(base, tmp_path / "plain", tmp_path / "same")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "same")
    assert all(torch.equal(one[n], other[n]) for n in other)
