"""The same merge on a GPU: not the CPU's bits where sums differ, but the same half unit of float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import LINEAR, exact, tensors, write_llama, write_lora
from tests.running import merge
from tests.tolerance import within_half_ulp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_merge_on_the_gpu_rounds_once(tmp_path: Path, dtype: str, name: str) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", dtype=dtype, device="cuda", verify="standard")
    before, after = tensors(base), tensors(tmp_path / "out")
    for weight, stored in after.items():
        if weight.split(".")[-2] not in LINEAR:
            assert torch.equal(stored, before[weight].to(stored.dtype))
            continue
        target, size = exact(before[weight], adapter, weight.removesuffix(".weight"), 1.5)
        assert within_half_ulp(stored, target, name, size)
