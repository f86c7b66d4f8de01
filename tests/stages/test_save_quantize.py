"""save.quantize: formats written anew, as their references write them, and loadable where those are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.ground import shards, tiles
from pipeline.ground.rounding import Rounding
from pipeline.ground.written import Written
from tests.models import tensors
from tests.running import merge
from tests.stages.quantized import (
    BNB,
    FILES_ONLY,
    FORMATS,
    assert_same_bytes,
    decoded,
    quantization,
    raw,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", BNB)
def test_every_tensor_is_what_transformers_and_bitsandbytes_save(
    dense: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """The float32 merge, quantized by transformers as it is loaded, and saved."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, _, nested = name.partition("-")
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(nested)}
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, **four)
    )
    merge(*dense, tmp_path / "wide", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path / "theirs")
    merge(*dense, tmp_path / "ours", dtype="float32", quantize=name)
    assert_same_bytes(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    theirs, ours = quantization(tmp_path / "theirs"), quantization(tmp_path / "ours")
    same = ["quant_method", "load_in_4bit", "load_in_8bit", *(four if kind != "int8" else {})]
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_codes_come_from_the_float32_sum_not_from_rounded_weights(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path]
) -> None:
    merge(*dense, tmp_path / "wide", dtype="float32", quantize="nf4")
    wide, half = tensors(tmp_path / "wide"), tensors(written["nf4"])
    for name, tensor in wide.items():
        if name.endswith((".weight", ".absmax")) and tensor.dtype == torch.uint8:
            assert torch.equal(tensor, half[name])
    merge(*dense, tmp_path / "rounded")
    merge(tmp_path / "rounded", dense[1], tmp_path / "twice", quantize="nf4", weight=1e-30)
    twice = tensors(tmp_path / "twice")
    assert any(not torch.equal(twice[n], half[n]) for n in half if n.endswith("absmax"))


@pytest.mark.parametrize("name", [*BNB, "fp8-block"])
def test_transformers_loads_what_was_written_and_answers(written: dict[str, Path], name: str) -> None:
    if name in BNB:
        pytest.importorskip("bitsandbytes")
    assert_loads(written[name])


@pytest.mark.parametrize("name", ["fp8-channel", "int4-g128"])
def test_transformers_loads_compressed_tensors(written: dict[str, Path], name: str) -> None:
    pytest.importorskip("compressed_tensors")
    assert_loads(written[name])


def assert_loads(folder: Path) -> None:
    """Every linear layer means to the loader what our decoder says; and the model answers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = decoded(folder)
    layers = {f"{n}.weight": m for n, m in model.named_modules() if f"{n}.weight" in Written(folder).codes}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(as_loaded(layer), ours[name].bfloat16())
    plain = {n: p for n, p in model.named_parameters() if n in ours and n not in layers}
    assert all(torch.equal(p.data, ours[n].to(p.dtype)) for n, p in plain.items())
    model = AutoModelForCausalLM.from_pretrained(folder)  # anew, for what runs packs its weights otherwise
    with torch.no_grad():
        logits = model(torch.arange(40)[None]).logits
    assert logits.shape == (1, 40, 160) and bool(logits.isfinite().all())


def as_loaded(layer: Any) -> Tensor:
    """The weight that a loaded layer computes with, in bfloat16."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if kind == "Linear8bitLt":
        import bitsandbytes

        return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).bfloat16()
    if getattr(layer, "weight", None) is not None and layer.weight.dtype == torch.bfloat16:
        return layer.weight.data
    from compressed_tensors.compressors import BaseCompressor

    form = "float-quantized" if hasattr(layer, "weight") else "pack-quantized"
    BaseCompressor.get_value_from_registry(form).decompress_module(layer)
    return layer.weight.data


@pytest.mark.parametrize("name", FORMATS)
def test_merged_and_other_layers_are_the_nearest_codes_of_the_sum(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path], name: str
) -> None:
    """Beside the pass: the encoder of a whole weight at once, which its own tests hold to references."""
    from pipeline.ground.codes.encoders.schemes import SCHEMES

    merge(*dense, tmp_path / "wide", dtype="float32")
    wide, found = tensors(tmp_path / "wide"), tensors(written[name])
    taken = [n for n in wide if n.endswith("proj.weight")]
    assert len(taken) == 14
    for weight in taken:
        encoder = SCHEMES[name].encoder(weight, tuple(wide[weight].shape), "BF16")
        assert encoder
        with encoder.open("cpu") as encode:
            made_at_once = encode(wide[weight], 0, None)
        parts = {encoder.parts[0].name: made_at_once.codes, **encoder.finish([made_at_once.sides])}
        assert [p for p in parts if raw(parts[p]) != raw(found.pop(p))] == []
    base = tensors(dense[0])
    assert found.keys() == base.keys() - set(taken)
    assert all(torch.equal(found[n], base[n]) for n in found)


@pytest.mark.parametrize("name", FORMATS)
def test_files_headers_index_and_hashes_are_true(written: dict[str, Path], name: str) -> None:
    folder = written[name]
    index = json.loads((folder / shards.INDEX).read_text())
    manifest = json.loads((folder / "merge.json").read_text())
    hashes = {d["name"]: (d["sha256"], d["num_bytes"]) for d in manifest["outputs"]}
    size, places = 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        read = shards.read_shard(path)
        assert len(read.header) % 8 == 0
        assert hashes[path.name] == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for entry in read.entries:
            size += entry.extent.length
            places[entry.name] = path.name
            start = entry.extent.offset - len(read.header)
            assert start % {"F32": 4, "BF16": 2, "I32": 4, "I64": 8}.get(entry.dtype, 1) == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert [file.get_tensor(n) is not None for n in file.keys()]  # noqa: SIM118
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == size


def test_late_tensors_stand_last_behind_a_header_that_was_filled_up(written: dict[str, Path]) -> None:
    late = 0
    for path in written["nf4-dq"].glob("*.safetensors"):
        read = shards.read_shard(path)
        states = [e for e in read.entries if "quant_state" in e.name]
        assert [e.name for e in read.entries[len(read.entries) - len(states) :]] == [e.name for e in states]
        late += len(states)
        if states:
            assert read.header.endswith(b"}" + b" " * (len(read.header) - len(read.header.rstrip(b" "))))
    assert late == 14


@pytest.mark.parametrize("name", ["nf4-dq", "fp8-block"])
def test_bytes_do_not_depend_on_workers_memory_or_tiles(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for number, (workers, limit, elements) in enumerate(
        [(1, None, 1 << 18), (4, None, 1 << 9), (8, 3_000_000, 1 << 12)]
    ):
        monkeypatch.setattr("pipeline.output.stream.num_workers", lambda n=workers: n)
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
        out = tmp_path / str(number)
        merge(*dense, out, quantize=name, memory_limit=limit, merge_dtype="float64")
        assert_same_bytes(tensors(out), tensors(tmp_path / "0"))


def test_fp8_may_be_rounded_by_chance(dense: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("fp8-block", "fp8-channel"):
        out = tmp_path / name
        settings = {"quantize": name, "rounding": Rounding.stochastic, "verify": "standard"}
        report = merge(*dense, out, **settings, verify_settings=FILES_ONLY)
        assert report.passed
        merge(*dense, tmp_path / f"{name}-nearest", quantize=name)
        one, other = tensors(out), tensors(tmp_path / f"{name}-nearest")
        for weight in one:
            moved = any(module in weight for module in ("q_proj", "down_proj")) and "scale" not in weight
            assert (raw(one[weight]) != raw(other[weight])) == moved
        again = merge(*dense, out, save="existing", verify="standard", verify_settings=FILES_ONLY)
        assert again.passed
