"""save.quantize: formats written anew, as their references write them, and loadable where those are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.ground import shards, tiles
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.report import Action, Status
from pipeline.ground.rounding import Rounding
from pipeline.ground.written import Written
from tests.making import llama_config
from tests.models import tensors, write_llama, write_lora
from tests.running import merge, pipeline

BNB = ["nf4", "nf4-dq", "fp4", "int8"]
FORMATS = [*BNB, "fp8-block", "fp8-channel", "int4-g128"]
FILES_ONLY = {"tokens": 0}
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="200KB", **SIZES)
    return base, write_lora(folder / "adapter", base, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def written(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of each format, verified."""
    folders = {}
    for name in FORMATS:
        folders[name] = tmp_path_factory.mktemp("written") / name
        report = merge(*made, folders[name], quantize=name, verify="standard", verify_settings=FILES_ONLY)
        assert {gate.name for gate in report.gates if gate.status is not Status.passed} == set()
    return folders


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [n for n in found if found[n].dtype != wanted[n].dtype or raw(found[n]) != raw(wanted[n])] == []


def quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every weight, codes decoded in float32."""
    found = Written(folder)
    shapes = {name: shape for name, _, shape in found.facts()}
    shapes |= {name: code.shape for name, code in found.codes.items()}
    beside = {e.name for code in found.codes.values() for e in code.entries} - found.codes.keys()
    return {
        name: found.rows(name, 0, prod(shape[:-1])).view(shape)
        for name, shape in shapes.items()
        if name not in beside
    }


@pytest.mark.parametrize("name", BNB)
def test_every_tensor_is_what_transformers_and_bitsandbytes_save(
    made: tuple[Path, Path], tmp_path: Path, name: str
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
    merge(*made, tmp_path / "wide", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path / "theirs")
    merge(*made, tmp_path / "ours", dtype="float32", quantize=name)
    assert_same_bytes(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    theirs, ours = quantization(tmp_path / "theirs"), quantization(tmp_path / "ours")
    same = ["quant_method", "load_in_4bit", "load_in_8bit", *(four if kind != "int8" else {})]
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_codes_come_from_the_float32_sum_not_from_rounded_weights(
    made: tuple[Path, Path], tmp_path: Path, written: dict[str, Path]
) -> None:
    merge(*made, tmp_path / "wide", dtype="float32", quantize="nf4")
    wide, half = tensors(tmp_path / "wide"), tensors(written["nf4"])
    for name, tensor in wide.items():
        if name.endswith((".weight", ".absmax")) and tensor.dtype == torch.uint8:
            assert torch.equal(tensor, half[name])
    merge(*made, tmp_path / "rounded")
    merge(tmp_path / "rounded", made[1], tmp_path / "twice", quantize="nf4", weight=1e-30)
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
    made: tuple[Path, Path], tmp_path: Path, written: dict[str, Path], name: str
) -> None:
    """Beside the pass: the encoder of a whole weight at once, which its own tests hold to references."""
    from pipeline.ground.codes.encoders.schemes import SCHEMES

    merge(*made, tmp_path / "wide", dtype="float32")
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
    base = tensors(made[0])
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
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for number, (workers, limit, elements) in enumerate(
        [(1, None, 1 << 18), (4, None, 1 << 9), (8, 3_000_000, 1 << 12)]
    ):
        monkeypatch.setattr("pipeline.stream.num_workers", lambda n=workers: n)
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
        out = tmp_path / str(number)
        merge(*made, out, quantize=name, memory_limit=limit, merge_dtype="float64")
        assert_same_bytes(tensors(out), tensors(tmp_path / "0"))


def test_fp8_may_be_rounded_by_chance(made: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("fp8-block", "fp8-channel"):
        out = tmp_path / name
        settings = {"quantize": name, "rounding": Rounding.stochastic, "verify": "standard"}
        report = merge(*made, out, **settings, verify_settings=FILES_ONLY)
        assert report.passed
        merge(*made, tmp_path / f"{name}-nearest", quantize=name)
        one, other = tensors(out), tensors(tmp_path / f"{name}-nearest")
        for weight in one:
            moved = any(module in weight for module in ("q_proj", "down_proj")) and "scale" not in weight
            assert (raw(one[weight]) != raw(other[weight])) == moved
        again = merge(*made, out, save="existing", verify="standard", verify_settings=FILES_ONLY)
        assert again.passed


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_is_verified_again_later(
    made: tuple[Path, Path], written: dict[str, Path], name: str
) -> None:
    report = merge(*made, written[name], save="existing", verify="standard", verify_settings=FILES_ONLY)
    assert report.passed
    assert {g.name for g in report.gates} >= {"structure", "untouched", "rounding", "retained", "hashes"}


def damaged(folder: Path, weight: str) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if weight in state:
            flat = state[weight].view(-1).view(torch.uint8)
            flat[7] ^= 0x88 if state[weight].dtype == torch.uint8 else 0x40
            save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "fp8-block", "int4-g128"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.v_proj"])
def test_one_wrong_code_is_found(
    made: tuple[Path, Path], tmp_path: Path, written: dict[str, Path], name: str, module: str
) -> None:
    import shutil

    folder = shutil.copytree(written[name], tmp_path / "out")
    (folder / "merge.json").unlink()
    suffix = "_packed" if name == "int4-g128" else ""
    damaged(folder, f"model.layers.1.{module}.weight{suffix}")
    gate = "rounding" if "q_proj" in module else "converted"
    with pytest.raises(PipelineError, match=f"{gate}: .*model.layers.1.{module}"):
        merge(*made, folder, save="existing", verify="standard", verify_settings=FILES_ONLY)


def test_a_tensor_beside_the_codes_that_is_gone_is_missed(
    made: tuple[Path, Path], tmp_path: Path, written: dict[str, Path]
) -> None:
    import shutil

    folder = shutil.copytree(written["int8"], tmp_path / "out")
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        kept = {n: t for n, t in state.items() if n != "model.layers.1.self_attn.q_proj.SCB"}
        if len(kept) < len(state):
            save_file(kept, path, {"format": "pt"})
            index = json.loads((folder / shards.INDEX).read_text())
            index["weight_map"].pop("model.layers.1.self_attn.q_proj.SCB")
            (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises((PipelineError, Refused), match=r"q_proj\.(weight|SCB)"):
        merge(*made, folder, save="existing", verify="structure")


def test_the_report_says_what_survives(written: dict[str, Path]) -> None:
    report = json.loads((written["nf4"] / "report.json").read_text())
    assert any("codes are off by" in text and "of the deltas" in text for text in report["findings"])
    manifest = json.loads((written["nf4"] / "merge.json").read_text())
    merged = [w for w in manifest["weights"].values() if w["action"] == "merged"]
    assert all(w["noise"] > 0 and w["dtype"] == "bnb nf4 block 64" for w in merged)
    encoded = [w for w in manifest["weights"].values() if w["action"] == "encoded"]
    assert len(merged) == 4 and len(encoded) == 10
    assert "quantized to bnb nf4 block 64" in (written["nf4"] / "README.md").read_text()


def test_noise_is_the_distance_over_the_delta(made: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(*made, tmp_path / "out", quantize="nf4")
    merge(*made, tmp_path / "wide", dtype="float32")
    base, wide, found = tensors(made[0]), tensors(tmp_path / "wide"), decoded(tmp_path / "out")
    for name, facts in report.weights.items():
        D = wide[name].double() - base[name].double()
        off = (found[name].double() - wide[name].double()).norm() / D.norm()
        kept = ((found[name].double() - base[name].double()) * D).sum() / (D * D).sum()
        assert facts["noise"] == pytest.approx(float(off), rel=1e-3)  # sums in float32 over bfloat16's D
        assert facts["retained"] == pytest.approx(float(kept), rel=1e-3)


def test_logits_are_compared_by_our_own_decoding_and_only_told(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    report = merge(
        *made, tmp_path / "out", quantize="nf4", verify="standard", verify_settings={"tokens": 128}
    )
    (gate,) = (gate for gate in report.gates if gate.name == "logits")
    assert gate.status is Status.passed and "reported only" in gate.wanted
    assert report.logits and report.logits["kl_mean"] > 0


def test_the_config_loses_what_it_said_before_at_every_depth() -> None:
    from pipeline.ground.model_config import edited

    config = {
        "compression_config": {"old": 1},
        "text_config": {"quantization_config": {"old": 2}, "n": 1},
        "n": 2,
    }
    new = {"quant_method": "fp8"}
    assert edited(config, {"quantization_config": new}) == {
        "text_config": {"n": 1},
        "n": 2,
        "quantization_config": new,
    }


def test_the_config_names_what_is_left(written: dict[str, Path]) -> None:
    for name in BNB:
        assert quantization(written[name])["llm_int8_skip_modules"] == ["lm_head"]
    assert quantization(written["fp8-block"])["modules_to_not_convert"] == ["lm_head"]
    assert quantization(written["int4-g128"])["ignore"] == ["re:.*lm_head$"]


def test_the_plan_knows_what_will_be_quantized_without_torch(here: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from pipeline.__main__ import main; main(); print('torch' in sys.modules)"
    request = ["base_model=base", "adapter=adapter", "output=out", "save.quantize=nf4-dq", "dry_run=true"]
    said = subprocess.run([sys.executable, "-c", code, *request], cwd=here, capture_output=True, text=True)
    assert said.stdout.endswith("False\n"), said.stderr
    assert "encoded (quantized anew)" in said.stdout


def test_columns_that_do_not_fill_groups_are_left_and_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", hidden_size=128, intermediate_size=192)
    adapter = write_lora(tmp_path / "adapter", base)
    report = merge(base, adapter, tmp_path / "out", quantize="int4-g128", verify="structure")
    told = "down_proj.weight [128, 192] does not fit int4-g128 and stays as it is (2 weights)"
    assert any(f.text.endswith(told) for f in report.plan.findings)
    assert quantization(tmp_path / "out")["ignore"] == ["re:.*lm_head$", "re:.*mlp\\.down_proj$"]


def test_ragged_blocks_are_written_and_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", hidden_size=192, intermediate_size=320)
    adapter = write_lora(tmp_path / "adapter", base)
    settings = {"quantize": "fp8-block", "verify": "standard", "verify_settings": FILES_ONLY}
    report = merge(base, adapter, tmp_path / "out", **settings)
    assert any("128 does not divide the sides of" in f.text for f in report.plan.findings)
    assert report.passed


def test_experts_are_quantized_where_loaders_take_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, vocab_size=160, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    expert = "model.layers.0.mlp.experts.1.up_proj.weight"
    for name, dtype in (("nf4", torch.bfloat16), ("fp8-block", torch.float8_e4m3fn)):
        merge(tmp_path / "base", adapter, tmp_path / name, quantize=name, verify="structure")
        assert tensors(tmp_path / name)[expert].dtype == dtype
        assert tensors(tmp_path / name)["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8-block")
    fused = model.model.layers[0].mlp.experts.gate_up_proj[1, 128:]
    assert torch.equal(fused, decoded(tmp_path / "fp8-block")[expert].bfloat16())
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def test_sizes_of_the_plan_bound_what_is_written(made: tuple[Path, Path], written: dict[str, Path]) -> None:
    for name in FORMATS:
        p = pipeline(*made, written[name].parent / "never", quantize=name)
        plan = p.plan()
        for shard, size in plan.shards.items():
            spare = size - (written[name] / shard).stat().st_size
            assert 0 <= spare <= (14 * 40 if name == "nf4-dq" else 0)
        assert plan.count()[Action.encoded] == 10


def test_float16_overflow_of_int8_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.bfloat16)
    adapter = write_lora(tmp_path / "adapter", base, size=300.0)
    with pytest.raises(PipelineError, match="holds values that are not finite"):
        merge(base, adapter, tmp_path / "out", quantize="int8")


def test_what_cannot_be_is_refused_in_a_sentence(made: tuple[Path, Path], tmp_path: Path) -> None:
    def refusal(base: Path, **settings: Any) -> str:
        with pytest.raises(Refused) as refused:
            merge(base, made[1], tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    told = refusal(made[0], quantize="fp8-blocks")
    assert told.startswith("save.quantize: no format 'fp8-blocks'; did you mean fp8-block; choose one of")
    assert "save.rounding: stochastic means nothing for nf4" in refusal(
        made[0], quantize="nf4", rounding=Rounding.stochastic
    )
    assert "the base is not quantized" in refusal(made[0], quantize="keep")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(Refused, match=r"save.quantize: gpt2 holds .*c_attn.weight transposed"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantize="nf4")


def test_a_hidden_size_of_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    config = llama_config()
    assert config["hidden_size"] % 128  # no group of int4-g128 fits
    from tests.making import write_adapter, write_base

    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    with pytest.raises(Refused, match="no weight of this model can be stored as int4-g128"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantize="int4-g128")
