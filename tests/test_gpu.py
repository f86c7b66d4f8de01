"""The same work on a GPU: bits where sums are exact, else the same half unit of float64; bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch

from pipeline.ground import tiles as cutting
from pipeline.ground.codes import mx
from pipeline.ground.errors import PipelineError
from pipeline.ground.files import as_bytes, read_tensor
from pipeline.ground.in_flight import InFlight
from pipeline.output import stream
from tests.ground.codes.holding import bits, found, rows_of, whole
from tests.ground.codes.test_mx import gpt_oss
from tests.models import LINEAR, exact, tensors, write_llama, write_lora
from tests.quantizing import BNB
from tests.running import merge
from tests.stages.test_extract_svd import ALL, extract, is_the_fine_tune, llama, tuned_pair
from tests.stages.test_quantized_bases import (
    FORMATS,
    assert_passed,
    assert_same,
    by_bitsandbytes,
    coded,
    dense_and_adapter,
    foretold,
)
from tests.tolerance import within_half_ulp

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_and_adapter(tmp_path_factory.mktemp("gpu"))


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


def test_each_threads_tiles_are_on_a_stream_of_their_own(tmp_path: Path) -> None:
    content = torch.randint(256, (8 << 20,), dtype=torch.uint8)
    path = tmp_path / "bytes"
    path.write_bytes(content.numpy().tobytes())
    in_flight, together, size = InFlight(GPU, 4), Barrier(4), 1 << 18

    def tile(start: int) -> tuple[torch.cuda.Stream, bytes]:
        together.wait()
        there = read_tensor(file.fileno(), start, size, GPU)
        return torch.cuda.current_stream(), bytes(as_bytes(there + 1))

    with path.open("rb") as file, ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: in_flight.run(partial(tile, n)), range(0, len(content), size)))
    assert len({stream.cuda_stream for stream, _ in made}) == 4
    assert torch.cuda.default_stream() not in {stream for stream, _ in made}
    assert b"".join(part for _, part in made) == (content + 1).numpy().tobytes()


def test_kernels_of_several_tiles_overlap() -> None:
    in_flight = InFlight(GPU, 4)

    def seconds(tiles: int) -> float:
        with ThreadPoolExecutor(tiles) as pool:
            together, began = Barrier(tiles), time.monotonic()

            def tile() -> None:
                together.wait()
                torch.cuda._sleep(500_000_000)  # cycles on one multiprocessor: a quarter of a second or more

            for done in [pool.submit(in_flight.run, tile) for _ in range(tiles)]:
                done.result()
            return time.monotonic() - began

    seconds(4)
    assert seconds(4) < 2 * seconds(1)


def test_a_tile_waits_for_what_its_weight_has_queued() -> None:
    in_flight = InFlight(GPU, 2)
    weight = torch.zeros(1 << 20, device=GPU)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    weight += 3
    with ThreadPoolExecutor(2) as pool:
        tiles = [pool.submit(in_flight.run, lambda: bytes(as_bytes(weight * 2))) for _ in range(2)]
        assert {tile.result() for tile in tiles} == {torch.full((1 << 20,), 6.0).numpy().tobytes()}


def test_experts_that_one_tile_reads_are_whole_for_the_others(tmp_path: Path) -> None:
    code = found(mx.find, tmp_path, gpt_oss(8, 512, 1024)).code
    expected, in_flight, height = whole(code), InFlight(GPU, 8), 256
    for _ in range(5):
        with code.open(GPU) as rows, ThreadPoolExecutor(8) as pool:

            def tile(start: int) -> torch.Tensor:
                return in_flight.run(lambda: rows(start, start + height).cpu())

            tiles = list(pool.map(tile, range(0, rows_of(code), height)))
        assert torch.equal(bits(torch.cat(tiles).view(code.shape)), bits(expected))


@pytest.mark.parametrize("name", ["bf16", *FORMATS, *BNB])
def test_one_tile_at_a_time_and_many_give_the_same_bytes(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = shared / "dense"
    if name != "bf16":
        base = (by_bitsandbytes(base, name) if name in BNB else coded(shared, name, tmp_path)).folder
    monkeypatch.setattr(cutting, "TILE_ELEMENTS", 1 << 10)
    for workers in (1, 8):
        monkeypatch.setattr(stream, "num_workers", lambda workers=workers: workers)
        merge(base, shared / "adapter", tmp_path / str(workers), device=GPU)
    for path in (tmp_path / "1").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "8" / path.name).read_bytes()


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
    memory(1 << 10)
    with pytest.raises(PipelineError, match="has not the memory for one tile"):
        merge(base, adapter, tmp_path / "none", device=GPU)
    rooms = [tmp_path / str(room) for room in (8, 16, 32, 64, 128)]  # MiB; cuBLAS takes 8 to 32 by itself
    for out in rooms:
        memory(int(out.name) << 20)
        with suppress(PipelineError):
            merge(base, adapter, out, device=GPU)
    least = next(out for out in rooms if out.exists())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (least / path.name).read_bytes()


def test_an_extraction_holds_the_fine_tune(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    extract(base, tuned, tmp_path / "out", rank=ALL, device=GPU)
    assert is_the_fine_tune(base, tuned, tmp_path / "out")
