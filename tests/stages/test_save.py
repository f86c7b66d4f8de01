"""What stands in the output folder: files, bytes, config, tokenizer, manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pipeline.ground import shards, tiles
from pipeline.ground.errors import PipelineError, Refused
from pipeline.output.layout import plan_shards
from tests.models import tensors, write_llama, write_lora
from tests.running import merge, pipeline
from tests.tolerance import FLOAT32_FORWARD


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base")
    return base, write_lora(folder / "adapter", base, target_modules=["q_proj", "down_proj"])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_untouched_weights_and_headers_keep_their_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out")
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    for name in names:
        before, after = shards.read_shard(base / name), shards.read_shard(tmp_path / "out" / name)
        assert before.header == after.header
        old, new = (base / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        for entry in before.entries:
            piece = slice(entry.extent.offset, entry.extent.offset + entry.extent.length)
            touched = "q_proj" in entry.name or "down_proj" in entry.name
            assert (old[piece] != new[piece]) == touched, entry.name


def test_index_says_true_sizes(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out", dtype="float32")
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    found = tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in found.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in found.values())
    theirs = json.loads((base / shards.INDEX).read_text())
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_parameters"] == theirs["metadata"]["total_parameters"]


def test_max_shard_size_bounds_every_shard(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out", max_shard_size="40KB")
    found = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [p.name for p in found] == [
        f"model-{i:05d}-of-{len(found):05d}.safetensors" for i in range(1, len(found) + 1)
    ]
    assert len(found) > 4
    for path in found:
        entries = shards.read_shard(path).entries
        assert len(entries) == 1 or sum(e.extent.length for e in entries) <= 40_000
    merge(base, adapter, tmp_path / "same")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "same")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_bytes_do_not_depend_on_workers_or_memory(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = made
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 9)  # many tiles
    for number, (workers, limit) in enumerate([(1, None), (4, None), (8, 25_000)]):
        monkeypatch.setattr("pipeline.output.stream.num_workers", lambda n=workers: n)
        merge(base, adapter, tmp_path / str(number), memory_limit=limit)
    for path in (tmp_path / "0").glob("*.safetensors"):
        assert len({sha256(tmp_path / n / path.name) for n in "012"}) == 1
    plan = plan_shards(_checkpoint(base, adapter, tmp_path), lambda w: w.dtype, None)
    assert max(len(place.grid) for shard in plan for place in shard.places) > 8


def _checkpoint(base: Path, adapter: Path, folder: Path):  # type: ignore[no-untyped-def]
    p = pipeline(base, adapter, folder / "none")
    return p.merge(p.dequantize(p.load()), p.extract())


def test_the_saved_model_loads_and_answers_as_the_adapter(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out", dtype="float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, str(adapter))
        adapted = model(tokens).logits
        with model.disable_adapter():
            before = model(tokens).logits
    assert merged.dtype == torch.float32
    assert (merged - adapted).abs().max() < FLOAT32_FORWARD * (adapted - before).abs().max()


def test_a_base_of_one_file_stays_one_file_without_index(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shard="1GB")
    merge(base, write_lora(tmp_path / "adapter", base), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "report.html",
        "report.json",
    ]


def test_config_changes_only_where_it_must(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    config = json.loads((base / "config.json").read_text())
    merge(base, adapter, tmp_path / "keep")
    assert (tmp_path / "keep" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merge(base, adapter, tmp_path / "half", dtype="float16")
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {**config, "dtype": "float16"}


def test_dtype_is_edited_at_every_depth_under_the_key_it_has() -> None:
    from pipeline.ground.model_config import edited

    config = {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "n": 1},
        "vision_config": {"n": 2},
    }
    assert edited(config, {"dtype": "float32"}) == {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "n": 1},
        "vision_config": {"n": 2},
    }
    assert edited({"n": 1}, {"dtype": "float32"}) == {"n": 1, "dtype": "float32"}


def test_integers_and_floats_of_another_dtype_keep_theirs(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_llama(tmp_path / "base", shard="1GB")
    state = tensors(base)
    state |= {
        "model.steps": torch.arange(3),
        "model.router.bias": torch.randn(7),
        "model.odd": torch.ones(3, 1, 5),
    }
    state["model.odd"] = state["model.odd"].to(torch.bfloat16)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    merge(base, write_lora(tmp_path / "adapter", base), tmp_path / "out", dtype="float32", verify="structure")
    after = tensors(tmp_path / "out")
    assert after["model.steps"].dtype == torch.int64
    assert after["model.router.bias"].dtype == torch.float32
    assert torch.equal(after["model.router.bias"], state["model.router.bias"])
    assert after["model.odd"].dtype == torch.float32
    assert after["model.odd"].shape == (3, 1, 5)


def test_a_tokenizer_comes_as_a_set_from_one_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    own_base, own_adapter = tmp_path / "base", tmp_path / "adapter"
    for source, target in ((base, own_base), (adapter, own_adapter)):
        target.mkdir()
        for path in source.iterdir():
            os.link(path, target / path.name)
    beside = {
        "tokenizer.json": "B",
        "added_tokens.json": "B",
        "chat_template.jinja": "B",
        "modeling_x.py": "B",
    }
    beside |= {"LICENSE": "B", "README.md": "B", "pytorch_model.bin": "B", "preprocessor_config.json": "B"}
    for name, text in beside.items():
        (own_base / name).write_text(text)
    (own_base / "additional_chat_templates").mkdir()
    (own_base / "additional_chat_templates" / "tool.jinja").write_text("B")
    merge(own_base, own_adapter, tmp_path / "one")
    for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja", "modeling_x.py", "LICENSE"):
        assert (tmp_path / "one" / name).read_text() == "B"
    assert (tmp_path / "one" / "additional_chat_templates" / "tool.jinja").read_text() == "B"
    assert not (tmp_path / "one" / "pytorch_model.bin").exists()
    assert "lora-pipeline" in (tmp_path / "one" / "README.md").read_text()

    (own_adapter / "tokenizer.json").write_text("A")
    (own_adapter / "tokenizer_config.json").write_text('{"chat_template": "A"}')
    merge(own_base, own_adapter, tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "A"
    assert not (tmp_path / "two" / "added_tokens.json").exists()  # the base's set is not mixed in
    assert not (tmp_path / "two" / "chat_template.jinja").exists()  # would come before the adapter's own
    assert (tmp_path / "two" / "preprocessor_config.json").read_text() == "B"
    manifest = json.loads((tmp_path / "two" / "merge.json").read_text())
    assert manifest["side_files"]["tokenizer.json"] == "adapter"
    assert manifest["side_files"]["LICENSE"] == "base"


def test_manifest_hashes_what_went_in_and_what_came_out(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    inputs = {d["name"]: d["sha256"] for d in manifest["inputs"]}
    for path in (
        *base.glob("*.safetensors"),
        adapter / "adapter_model.safetensors",
        adapter / "adapter_config.json",
    ):
        assert inputs[path.name] == sha256(path)
    outputs = {d["name"]: d["sha256"] for d in manifest["outputs"]}
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert outputs.keys() == there - {"merge.json", "report.json", "report.html"}
    assert all(sha256(tmp_path / "out" / name) == digest for name, digest in outputs.items())
    assert str(tmp_path) not in json.dumps(manifest) + (tmp_path / "out" / "report.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_both_gives_an_adapter_that_peft_loads(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out", save="both")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out" / "adapter")
    )
    assert model.peft_config["default"].r == 4
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert "adapter/adapter_model.safetensors" in {d["name"] for d in manifest["outputs"]}


def test_every_shard_says_its_format(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    merge(base, adapter, tmp_path / "out", dtype="float16")
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_float16_overflow_fails_and_leaves_nothing(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.bfloat16)
    adapter = write_lora(tmp_path / "adapter", base, size=300.0)
    with pytest.raises(PipelineError, match=r"not finite.*bfloat16 has a wider range"):
        merge(base, adapter, tmp_path / "made" / "out", dtype="float16")
    assert not (tmp_path / "made").exists()


def test_a_failing_write_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.ground.shard_writer.ShardWriter.write", full)
    with pytest.raises(OSError, match="No space"):
        merge(*made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_changes_during_the_run_stops_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    p = pipeline(base, adapter, tmp_path / "out")
    merged = p.merge(p.dequantize(p.load()), p.extract())
    shard = next(iter(base.glob("*.safetensors")))
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        weight = next(w for w in merged.weights if w.source and w.source.extent.file.path == shard)
        with pytest.raises(PipelineError, match="changed while the run was using it"), weight.open("cpu"):
            pass
    finally:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_disk_too_small_is_told_before_writing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ground.workplace.free_bytes", lambda _: 1000)
    with pytest.raises(Refused, match=r"output: '.*out' needs .* kB, but its disk has 1 kB free"):
        merge(*made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_memory_limit_below_one_tile_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"memory_limit: 1 kB is less than the largest tile and its deltas need"
    ):
        merge(*made, tmp_path / "out", memory_limit=1000)


def test_both_refuses_a_factor_that_the_adapter_beside_would_not_have(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=r"save: both would keep the adapter as it is .* merge.weight=-1"):
        merge(*made, tmp_path / "out", save="both", weight=-1.0)


def test_an_index_with_one_shard_stays(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shard="1GB")
    adapter = write_lora(tmp_path / "adapter", base)
    name = "model-00001-of-00001.safetensors"
    names = [e.name for e in shards.read_shard(base / "model.safetensors").entries]
    (base / "model.safetensors").rename(base / name)
    (base / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    report = merge(base, adapter, tmp_path / "out", verify="standard", verify_settings={"tokens": 0})
    assert report.passed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_that_a_merge_adds_or_drops_are_laid_out(made: tuple[Path, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    merged = _checkpoint(*made, tmp_path)
    first, *rest = merged.weights
    added = replace(first, name="model.extra.weight")
    planned = plan_shards(replace(merged, weights=(*rest, added)), lambda w: w.dtype, None)
    names = [place.slot.name for shard in planned for place in shard.places]
    assert sorted(names) == sorted([w.name for w in rest] + ["model.extra.weight"])
    assert planned[-1].places[-1].slot.name == "model.extra.weight"


def test_empty_tensors_pass_through(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_llama(tmp_path / "base", shard="1GB")
    state = tensors(base) | {"model.none": torch.empty(0, dtype=torch.bfloat16)}
    state["model.hollow"] = torch.empty(3, 0, dtype=torch.bfloat16)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    adapter = write_lora(tmp_path / "adapter", write_llama(tmp_path / "plain"))
    settings = {"verify": "standard", "verify_settings": {"tokens": 0}, "dtype": "float32"}
    assert merge(base, adapter, tmp_path / "out", **settings).passed
    assert tensors(tmp_path / "out")["model.hollow"].shape == (3, 0)


def test_peak_memory_stays_under_the_plan(tmp_path: Path) -> None:
    """A 260 MB base in a process that holds little beyond torch itself."""
    import subprocess
    import sys

    base = write_llama(
        tmp_path / "base", shard="1GB", hidden_size=1024, intermediate_size=8192, num_hidden_layers=4
    )
    adapter = write_lora(tmp_path / "adapter", base)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    tell = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    run = f"import sys; from pipeline.__main__ import main; status = main(); {tell}; sys.exit(status)"
    request = [f"base_model={base}", f"adapter={adapter}", f"output={tmp_path / 'out'}", "verify=none"]

    def peak(code: str, *arguments: str) -> int:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) * 1024

    idle = peak(f"import torch, hydra; torch.ones(9) @ torch.ones(9); {tell}")
    assert size > 200e6
    assert peak(run, *request) - idle < 110e6
