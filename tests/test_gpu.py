"""The same work on a GPU: bits where sums are exact, else the same half unit of float64; bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.ground.errors import PipelineError
from pipeline.ground.files import as_bytes, read_tensor
from tests.models import LINEAR, exact, tensors, write_llama, write_lora
from tests.quantizing import BNB
from tests.running import merge
from tests.stages.test_extract_svd import ALL, extract, is_the_fine_tune, llama, tuned_pair
from tests.stages.test_quantized_bases import (
    FORMATS,
    SHAPE,
    TARGETS,
    assert_passed,
    assert_same,
    by_bitsandbytes,
    coded,
    foretold,
    make_exact,
)
from tests.tolerance import within_half_ulp

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, a Llama in bfloat16, and `adapter`, whose deltas are exact."""
    folder = tmp_path_factory.mktemp("gpu")
    write_llama(folder / "dense", shard="1GB", **SHAPE)
    write_lora(folder / "adapter", folder / "dense", target_modules=TARGETS)
    make_exact(folder / "adapter")
    return folder


def test_bytes_come_back_from_the_gpu_as_they_went(tmp_path: Path) -> None:
    """Through pinned memory that is handed out again while copies are still on their way."""
    content = torch.randint(256, (64 << 20,), dtype=torch.uint8)
    path = tmp_path / "bytes"
    path.write_bytes(content.numpy().tobytes())
    size, back = 1 << 20, bytearray()
    with path.open("rb") as file:
        there = [read_tensor(file.fileno(), start, size, GPU) for start in range(0, len(content), size)]
    for part in there:
        back += as_bytes(part)
    assert bytes(back) == path.read_bytes()


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_a_merge_rounds_once(tmp_path: Path, dtype: str, name: str) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", dtype=dtype, device=GPU, verify="standard")
    before, after = tensors(base), tensors(tmp_path / "out")
    for weight, stored in after.items():
        if weight.split(".")[-2] not in LINEAR:
            assert torch.equal(stored, before[weight].to(stored.dtype))
            continue
        target, size = exact(before[weight], adapter, weight.removesuffix(".weight"), 1.5)
        assert within_half_ulp(stored, target, name, size)


@pytest.mark.parametrize("name", [*FORMATS, *BNB])
def test_codes_mean_the_same_there(shared: Path, tmp_path: Path, name: str) -> None:
    base = by_bitsandbytes(shared / "dense", name) if name in BNB else coded(shared, name, tmp_path)
    report = merge(base.folder, shared / "adapter", tmp_path / "out", device=GPU, verify="standard")
    assert_passed(report)
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))


@pytest.fixture
def memory() -> Iterator[Callable[[int], None]]:
    """Leaves so many bytes of the GPU's memory to this process."""

    def left(num_bytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min((torch.cuda.memory_reserved() + num_bytes) / total, 1.0)
        )

    yield left
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_short_of_memory_the_bytes_are_the_same(tmp_path: Path, memory: Callable[[int], None]) -> None:
    base = write_llama(tmp_path / "base", hidden_size=1024, intermediate_size=4096)
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out", device=GPU)
    memory(12 << 20)
    merge(base, adapter, tmp_path / "other", device=GPU)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    memory(1 << 10)
    with pytest.raises(PipelineError, match="has not the memory for one tile"):
        merge(base, adapter, tmp_path / "third", device=GPU)


def test_an_extraction_holds_the_fine_tune(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    extract(base, tuned, tmp_path / "out", rank=ALL, device=GPU)
    assert is_the_fine_tune(base, tuned, tmp_path / "out")
